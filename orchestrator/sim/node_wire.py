"""The node's half of the wire, for simulated nodes on real streams; the mirror image of `wire_in` and `wire_out`."""

from typing import assert_never

from edgellm.orchestrator.core.commands import ReleaseAttempt, StartDecode, StartPrefill, WelcomeNode
from edgellm.orchestrator.core.events import (
    AttemptFailed,
    AttemptReleased,
    HeartbeatReceived,
    KvSent,
    NodeEvent,
    PrefillDone,
    TokenGenerated,
)
from edgellm.orchestrator.core.values import (
    ConnectionId,
    FailureKind,
    Generation,
    KvTarget,
    Layers,
    NodeId,
    NodeLoad,
    NodeProfile,
    SampledToken,
    Sampling,
)
from edgellm.orchestrator.wire_in import attempt_from_proto
from edgellm.orchestrator.wire_out import attempt_to_proto
from edgellm.runtime.rpc import cluster_pb2, inference_pb2

_FAILURE: dict[FailureKind, cluster_pb2.FailureKind.ValueType] = {
    "engine": cluster_pb2.FAILURE_KIND_ENGINE,
    "transfer": cluster_pb2.FAILURE_KIND_TRANSFER,
    "capacity": cluster_pb2.FAILURE_KIND_CAPACITY,
    "request": cluster_pb2.FAILURE_KIND_REQUEST,
}
_FINISH = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}


def hello_to_proto(profile: NodeProfile, block_tokens: int) -> cluster_pb2.NodeMessage:
    engines = [
        cluster_pb2.EngineInfo(
            name=engine.name,
            phase=engine.phase,
            first_layer=engine.first_layer,
            num_layers=engine.num_layers,
            world=1,
            precision=engine.precision,
            max_sequences=engine.max_sequences,
            max_seq_len=engine.max_seq_len,
        )
        for engine in profile.engines
    ]
    hello = cluster_pb2.Hello(
        node_id=profile.node_id,
        pid=profile.pid,
        role=profile.role,
        device_class=profile.device_class,
        bundle_sha256=profile.bundle_sha256,
        kv_contract_sha256=profile.kv_contract_sha256,
        engines=engines,
        kv_blocks=profile.kv_blocks,
        block_tokens=block_tokens,
        exchange_address=profile.exchange_address,
        host_id=profile.host_id,
        kv_bytes_per_token=profile.kv_bytes_per_token,
    )
    return cluster_pb2.NodeMessage(hello=hello)


def event_to_proto(event: NodeEvent) -> cluster_pb2.NodeMessage:
    match event:
        case HeartbeatReceived(load=load):
            return cluster_pb2.NodeMessage(heartbeat=_heartbeat(load))
        case PrefillDone():
            done = cluster_pb2.PrefillDone(
                attempt=attempt_to_proto(event.attempt),
                first_token=_token(event.first_token) if event.first_token is not None else None,
                prefill_ms=event.prefill_ms,
            )
            return cluster_pb2.NodeMessage(prefill_done=done)
        case KvSent():
            return cluster_pb2.NodeMessage(kv_sent=_kv_sent(event))
        case TokenGenerated(attempt=attempt, token=token):
            one = cluster_pb2.AttemptToken(attempt=attempt_to_proto(attempt), token=_token(token))
            return cluster_pb2.NodeMessage(tokens=cluster_pb2.Tokens(tokens=[one]))
        case AttemptFailed():
            failed = cluster_pb2.RequestFailed(
                attempt=attempt_to_proto(event.attempt),
                kind=_FAILURE[event.kind],
                message=event.message,
                peer_node_id=event.peer or "",
            )
            return cluster_pb2.NodeMessage(request_failed=failed)
        case AttemptReleased(attempt=attempt):
            return cluster_pb2.NodeMessage(released=cluster_pb2.Released(attempt=attempt_to_proto(attempt)))
        case _:
            assert_never(event)


def command_from_proto(
    connection: ConnectionId, command: cluster_pb2.Command
) -> WelcomeNode | StartPrefill | StartDecode | ReleaseAttempt | None:
    """None for a shutdown."""
    match command.WhichOneof("command"):
        case "welcome":
            return WelcomeNode(connection=connection, incarnation=command.welcome.incarnation)
        case "prefill":
            return _prefill(connection, command.prefill)
        case "decode":
            decode = command.decode
            return StartDecode(
                connection=connection,
                attempt=attempt_from_proto(decode.attempt),
                prompt=tuple(decode.prompt),
                generated=tuple(decode.generated),
                generation=_generation(decode.generation),
            )
        case "release":
            return ReleaseAttempt(connection=connection, attempt=attempt_from_proto(command.release.attempt))
        case _:
            return None


def _prefill(connection: ConnectionId, prefill: cluster_pb2.Prefill) -> StartPrefill:
    targets = [
        KvTarget(
            node_id=NodeId(target.node_id),
            address=target.address,
            host_id=target.host_id,
            layers=Layers(target.first_layer, target.num_layers),
            backup=target.backup,
        )
        for target in prefill.targets
    ]
    return StartPrefill(
        connection=connection,
        attempt=attempt_from_proto(prefill.attempt),
        prompt=tuple(prefill.prompt),
        generated=tuple(prefill.generated),
        generation=_generation(prefill.generation),
        targets=tuple(targets),
        degraded=prefill.degraded,
    )


def _generation(generation: cluster_pb2.Generation) -> Generation:
    return Generation(
        max_tokens=generation.max_tokens,
        sampling=Sampling(seed=generation.sampling.seed),
        stop_token_ids=tuple(generation.stop_token_ids),
        logprobs=generation.logprobs,
    )


def _heartbeat(load: NodeLoad) -> cluster_pb2.Heartbeat:
    return cluster_pb2.Heartbeat(
        steps=load.steps,
        running=load.running,
        waiting=load.waiting,
        kv_blocks_free=load.kv_blocks_free,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_ms=load.decode_step_ms,
    )


def _kv_sent(event: KvSent) -> cluster_pb2.KvSent:
    transfer = event.transfer
    return cluster_pb2.KvSent(
        attempt=attempt_to_proto(event.attempt),
        transfer=inference_pb2.KvTransfer(
            transport=transfer.transport,
            codec=transfer.codec,
            chunks=transfer.chunks,
            bytes=transfer.bytes,
            hidden_ms=transfer.hidden_ms,
            exposed_ms=transfer.exposed_ms,
        ),
    )


def _token(token: SampledToken) -> cluster_pb2.SampledToken:
    return cluster_pb2.SampledToken(
        index=token.index, token_id=token.token_id, logprob=token.logprob, finish_reason=_FINISH[token.finish]
    )
