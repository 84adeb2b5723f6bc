"""What nodes say, as the core's values. Nothing is decided here."""

from collections.abc import Iterable, Iterator

from edgellm.orchestrator.core import events
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    EngineProfile,
    FailureKind,
    HeldKv,
    KvTransfer,
    Layers,
    NodeId,
    NodeLoad,
    NodeProfile,
    RequestId,
    Role,
    SampledToken,
)
from edgellm.runtime.rpc import cluster_pb2, inference_pb2

_FAILURE: dict[cluster_pb2.FailureKind.ValueType, FailureKind] = {
    cluster_pb2.FAILURE_KIND_TRANSFER: "transfer",
    cluster_pb2.FAILURE_KIND_CAPACITY: "capacity",
    cluster_pb2.FAILURE_KIND_REQUEST: "request",
    cluster_pb2.FAILURE_KIND_STALE: "stale",
}


HIGHEST_EPOCH = 2**62
"""That a node can have heard of: what is counted from there on still fits a signed integer of 64 bits."""


class WireError(ValueError):
    """A node sent something that has no meaning."""


def profile_from_proto(hello: cluster_pb2.Hello) -> NodeProfile:
    """Raises WireError for an unknown role, or an epoch that nobody can have given."""
    if hello.highest_epoch > HIGHEST_EPOCH:
        raise WireError(f"node {hello.node_id} has heard of epoch {hello.highest_epoch}, which nobody gave: restart it")
    return NodeProfile(
        node_id=NodeId(hello.node_id),
        pid=hello.pid,
        role=_role(hello.role),
        device_class=hello.device_class,
        bundle_sha256=hello.bundle_sha256,
        kv_contract_sha256=hello.kv_contract_sha256,
        engines=tuple(_engine(engine) for engine in hello.engines),
        kv_blocks=hello.kv_blocks,
        exchange_address=hello.exchange_address,
        host_id=hello.host_id,
        kv_bytes_per_token=hello.kv_bytes_per_token,
        spare=hello.spare,
    )


def events_from_proto(connection: ConnectionId, message: cluster_pb2.NodeMessage) -> Iterator[events.NodeEvent]:
    """The events of one message after the hello. Raises WireError for a message of an unknown kind."""
    match message.WhichOneof("message"):
        case "heartbeat":
            yield events.HeartbeatReceived(connection=connection, load=_load(message.heartbeat))
        case "prefill_done":
            yield _prefill_done(connection, message.prefill_done)
        case "kv_sent":
            sent = message.kv_sent
            transfer = _transfer(sent.transfer)
            yield events.KvSent(connection=connection, attempt=attempt_from_proto(sent.attempt), transfer=transfer)
        case "tokens":
            for generated in message.tokens.tokens:
                attempt, token = attempt_from_proto(generated.attempt), _token(generated.token)
                yield events.TokenGenerated(connection=connection, attempt=attempt, token=token)
        case "request_failed":
            yield _attempt_failed(connection, message.request_failed)
        case "released":
            attempt = attempt_from_proto(message.released.attempt)
            yield events.AttemptReleased(connection=connection, attempt=attempt)
        case "resumed":
            attempt = attempt_from_proto(message.resumed.attempt)
            yield events.AttemptResumed(connection=connection, attempt=attempt)
        case "pipeline_broken":
            broken = message.pipeline_broken
            attempts = tuple(attempt_from_proto(attempt) for attempt in broken.attempts)
            yield events.PipelineBroken(connection=connection, peer=NodeId(broken.peer_node_id), attempts=attempts)
        case "kv_copied":
            yield events.KvCopied(connection=connection, copies=held_from_proto(message.kv_copied.copies))
        case "copy_lost":
            yield _copy_lost(connection, message.copy_lost)
        case kind:
            raise WireError(
                f"a node sent {kind or 'an unknown message'} where it makes no sense: is it another version?"
            )


def attempt_from_proto(attempt: cluster_pb2.Attempt) -> AttemptId:
    return AttemptId(request_id=RequestId(attempt.request_id), epoch=attempt.epoch)


def held_from_proto(held: Iterable[cluster_pb2.HeldKv]) -> tuple[HeldKv, ...]:
    return tuple(
        HeldKv(
            attempt=attempt_from_proto(part.attempt),
            layers=Layers(part.first_layer, part.num_layers),
            tokens=part.tokens,
        )
        for part in held
    )


def _role(role: str) -> Role:
    match role:
        case "prefill" | "decode":
            return role
        case _:
            raise WireError(f"unknown role {role!r}: a node is prefill or decode")


def _engine(engine: cluster_pb2.EngineInfo) -> EngineProfile:
    return EngineProfile(
        name=engine.name,
        phase=_role(engine.phase),
        first_layer=engine.first_layer,
        num_layers=engine.num_layers,
        precision=engine.precision,
        max_sequences=engine.max_sequences,
        max_seq_len=engine.max_seq_len,
        planned=engine.planned,
    )


def _load(beat: cluster_pb2.Heartbeat) -> NodeLoad:
    return NodeLoad(
        steps=beat.steps,
        running=beat.running,
        waiting=beat.waiting,
        kv_blocks_free=beat.kv_blocks_free,
        rss_bytes=beat.rss_bytes,
        rss_shared_bytes=beat.rss_shared_bytes,
        prefill_tokens_per_s=beat.prefill_tokens_per_s,
        decode_step_ms=beat.decode_step_ms,
    )


def _prefill_done(connection: ConnectionId, done: cluster_pb2.PrefillDone) -> events.PrefillDone:
    return events.PrefillDone(
        connection=connection,
        attempt=attempt_from_proto(done.attempt),
        first_token=_token(done.first_token) if done.HasField("first_token") else None,
        prefill_ms=done.prefill_ms,
    )


def _attempt_failed(connection: ConnectionId, failed: cluster_pb2.RequestFailed) -> events.AttemptFailed:
    return events.AttemptFailed(
        connection=connection,
        attempt=attempt_from_proto(failed.attempt),
        kind=_FAILURE.get(failed.kind, "engine"),
        message=failed.message,
        peer=NodeId(failed.peer_node_id) if failed.peer_node_id else None,
    )


def _copy_lost(connection: ConnectionId, lost: cluster_pb2.CopyLost) -> events.CopyLost:
    return events.CopyLost(
        connection=connection,
        attempt=attempt_from_proto(lost.attempt),
        holder=NodeId(lost.holder_node_id),
        layers=Layers(lost.first_layer, lost.num_layers),
        kind=_FAILURE.get(lost.kind, "engine"),
        message=lost.message,
    )


def _token(token: cluster_pb2.SampledToken) -> SampledToken:
    reasons = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}
    finish = reasons.get(token.finish_reason)
    return SampledToken(
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob if token.HasField("logprob") else None,
        finish="stop" if finish == "stop" else "length" if finish == "length" else None,
    )


def _transfer(transfer: inference_pb2.KvTransfer) -> KvTransfer:
    return KvTransfer(
        transport=transfer.transport,
        codec=transfer.codec,
        chunks=transfer.chunks,
        bytes=transfer.bytes,
        hidden_ms=transfer.hidden_ms,
        exposed_ms=transfer.exposed_ms,
    )
