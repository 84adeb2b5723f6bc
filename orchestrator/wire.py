"""Between protobuf messages and the core's values. Nothing is decided here."""

from collections.abc import Iterator
from typing import assert_never

from edgellm.orchestrator.core import commands, events
from edgellm.orchestrator.core.values import (
    AttemptId,
    ConnectionId,
    EngineProfile,
    FailureKind,
    FinishReason,
    Generation,
    KvTarget,
    KvTransfer,
    NodeId,
    NodeLoad,
    NodeProfile,
    PrefillPath,
    RequestId,
    RequestStats,
    Role,
    SampledToken,
    Sampling,
)
from edgellm.runtime.rpc import cluster_pb2, inference_pb2

TRANSFER_TIMEOUT_MS = 10_000
KV_TIMEOUT_MS = 60_000
"""A decode node waits this long for KV. The prefill node reports a transfer that stands still much earlier."""

_FINISH: dict[FinishReason, inference_pb2.FinishReason.ValueType] = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "cancelled": inference_pb2.FINISH_REASON_CANCELLED,
    "deadline": inference_pb2.FINISH_REASON_DEADLINE,
    "error": inference_pb2.FINISH_REASON_ERROR,
}
_PATH: dict[PrefillPath | None, inference_pb2.PrefillPath.ValueType] = {
    None: inference_pb2.PREFILL_PATH_UNSPECIFIED,
    "remote": inference_pb2.PREFILL_PATH_REMOTE,
    "local": inference_pb2.PREFILL_PATH_LOCAL,
    "degraded": inference_pb2.PREFILL_PATH_DEGRADED,
}
_FAILURE: dict[cluster_pb2.FailureKind.ValueType, FailureKind] = {
    cluster_pb2.FAILURE_KIND_TRANSFER: "transfer",
    cluster_pb2.FAILURE_KIND_CAPACITY: "capacity",
    cluster_pb2.FAILURE_KIND_REQUEST: "request",
}


class WireError(ValueError):
    """A node sent something that has no meaning."""


# Node messages -> events


def profile_from_proto(hello: cluster_pb2.Hello) -> NodeProfile:
    """Raises WireError for an unknown role."""
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
        case kind:
            raise WireError(
                f"a node sent {kind or 'an unknown message'} where it makes no sense: is it another version?"
            )


def attempt_from_proto(attempt: cluster_pb2.Attempt) -> AttemptId:
    return AttemptId(request_id=RequestId(attempt.request_id), epoch=attempt.epoch)


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


# Commands -> protobuf


def command_to_proto(
    command: commands.WelcomeNode | commands.StartPrefill | commands.StartDecode | commands.ReleaseAttempt,
    heartbeat_interval_s: float,
) -> cluster_pb2.Command:
    match command:
        case commands.WelcomeNode():
            welcome = cluster_pb2.Welcome(
                incarnation=command.incarnation, heartbeat_interval_ms=round(1000 * heartbeat_interval_s)
            )
            return cluster_pb2.Command(welcome=welcome)
        case commands.StartPrefill():
            return cluster_pb2.Command(prefill=_prefill_to_proto(command))
        case commands.StartDecode():
            return cluster_pb2.Command(decode=_decode_to_proto(command))
        case commands.ReleaseAttempt():
            return cluster_pb2.Command(release=cluster_pb2.Release(attempt=attempt_to_proto(command.attempt)))
        case _:
            assert_never(command)


def attempt_to_proto(attempt: AttemptId) -> cluster_pb2.Attempt:
    return cluster_pb2.Attempt(request_id=attempt.request_id, epoch=attempt.epoch)


def _prefill_to_proto(command: commands.StartPrefill) -> cluster_pb2.Prefill:
    return cluster_pb2.Prefill(
        attempt=attempt_to_proto(command.attempt),
        prompt=command.prompt,
        generation=_generation_to_proto(command.generation),
        targets=[_target_to_proto(target) for target in command.targets],
        degraded=command.degraded,
        transfer_timeout_ms=TRANSFER_TIMEOUT_MS,
        generated=command.generated,
    )


def _decode_to_proto(command: commands.StartDecode) -> cluster_pb2.Decode:
    return cluster_pb2.Decode(
        attempt=attempt_to_proto(command.attempt),
        prompt=command.prompt,
        generated=command.generated,
        generation=_generation_to_proto(command.generation),
        kv_timeout_ms=KV_TIMEOUT_MS,
    )


def _generation_to_proto(generation: Generation) -> cluster_pb2.Generation:
    return cluster_pb2.Generation(
        sampling=_sampling_to_proto(generation.sampling),
        max_tokens=generation.max_tokens,
        stop_token_ids=generation.stop_token_ids,
        logprobs=generation.logprobs,
    )


def _sampling_to_proto(sampling: Sampling) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )


def _target_to_proto(target: KvTarget) -> cluster_pb2.KvTarget:
    return cluster_pb2.KvTarget(
        node_id=target.node_id,
        address=target.address,
        host_id=target.host_id,
        first_layer=target.first_layer,
        num_layers=target.num_layers,
    )


def finished_to_proto(reason: FinishReason, message: str, stats: RequestStats, text: str) -> inference_pb2.Finished:
    return inference_pb2.Finished(
        reason=_FINISH[reason],
        message=message,
        prompt_tokens=stats.prompt_tokens,
        generated_tokens=stats.generated_tokens,
        text=text,
        timing=inference_pb2.Timing(
            queue_ms=stats.queue_ms,
            prefill_ms=stats.prefill_ms,
            ttft_ms=stats.ttft_ms,
            tpot_ms=stats.tpot_ms,
            total_ms=stats.total_ms,
        ),
        prefill_path=_PATH[stats.prefill_path],
        kv=inference_pb2.KvTransfer(
            transport=stats.kv.transport,
            codec=stats.kv.codec,
            chunks=stats.kv.chunks,
            bytes=stats.kv.bytes,
            hidden_ms=stats.kv.hidden_ms,
            exposed_ms=stats.kv.exposed_ms,
        ),
        takeovers=stats.takeovers,
    )
