"""Between protobuf messages and this node's own types."""

from typing import assert_never

import numpy as np

from edgellm.engines.sampling import SamplingParams
from edgellm.runtime import messages
from edgellm.runtime.generation import FinishReason, Generation, SampledToken
from edgellm.runtime.kv.types import Attempt, HeldKv, KvCopy, KvTarget, NodeId, RequestId, Stage, TransferStats
from edgellm.runtime.rpc import cluster_pb2, inference_pb2

_FINISH: dict[FinishReason | None, inference_pb2.FinishReason.ValueType] = {
    None: inference_pb2.FINISH_REASON_UNSPECIFIED,
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
}
_FINISHED = {reason: finish for finish, reason in _FINISH.items()}
FAILURE_TO_PROTO: dict[messages.FailureKind, cluster_pb2.FailureKind.ValueType] = {
    "engine": cluster_pb2.FAILURE_KIND_ENGINE,
    "transfer": cluster_pb2.FAILURE_KIND_TRANSFER,
    "capacity": cluster_pb2.FAILURE_KIND_CAPACITY,
    "request": cluster_pb2.FAILURE_KIND_REQUEST,
    "stale": cluster_pb2.FAILURE_KIND_STALE,
}


def command_from_proto(command: cluster_pb2.Command) -> messages.Command:
    """Raises ValueError for a command this node does not know."""
    match command.WhichOneof("command"):
        case "welcome":
            welcome = command.welcome
            return messages.Welcome(
                incarnation=welcome.incarnation,
                heartbeat_interval_s=welcome.heartbeat_interval_ms / 1e3,
                first_epoch=welcome.first_epoch,
            )
        case "prefill":
            return _prefill(command.prefill)
        case "decode":
            return _decode(command.decode)
        case "hold":
            return _hold(command.hold)
        case "protect":
            protect = command.protect
            return messages.Protect(
                attempt=attempt_from_proto(protect.attempt), copies=tuple(_copy(copy) for copy in protect.copies)
            )
        case "release":
            return messages.Release(attempt=attempt_from_proto(command.release.attempt))
        case "shutdown":
            return messages.Shutdown()
        case kind:
            raise ValueError(f"the orchestrator sent an unknown command {kind!r}; is it another version?")


def event_to_proto(event: messages.Event) -> cluster_pb2.NodeMessage:
    match event:
        case messages.PrefillDone():
            return cluster_pb2.NodeMessage(prefill_done=_prefill_done(event))
        case messages.KvSent(attempt=attempt, stats=stats):
            sent = cluster_pb2.KvSent(attempt=attempt_to_proto(attempt), transfer=transfer_to_proto(stats))
            return cluster_pb2.NodeMessage(kv_sent=sent)
        case messages.Tokens():
            return cluster_pb2.NodeMessage(tokens=_tokens(event))
        case messages.RequestFailed(attempt=attempt, kind=kind, message=message, peer=peer):
            failed = cluster_pb2.RequestFailed(
                attempt=attempt_to_proto(attempt), kind=FAILURE_TO_PROTO[kind], message=message, peer_node_id=peer or ""
            )
            return cluster_pb2.NodeMessage(request_failed=failed)
        case messages.Released(attempt=attempt):
            return cluster_pb2.NodeMessage(released=cluster_pb2.Released(attempt=attempt_to_proto(attempt)))
        case messages.Resumed(attempt=attempt):
            return cluster_pb2.NodeMessage(resumed=cluster_pb2.Resumed(attempt=attempt_to_proto(attempt)))
        case messages.PipelineBroken(peer=peer, attempts=attempts):
            broken = cluster_pb2.PipelineBroken(
                peer_node_id=peer, attempts=[attempt_to_proto(attempt) for attempt in attempts]
            )
            return cluster_pb2.NodeMessage(pipeline_broken=broken)
        case messages.KvCopied(copies=copies):
            copied = cluster_pb2.KvCopied(copies=[held_to_proto(copy) for copy in copies])
            return cluster_pb2.NodeMessage(kv_copied=copied)
        case messages.CopyLost():
            return cluster_pb2.NodeMessage(copy_lost=_copy_lost(event))
        case _:
            assert_never(event)


def attempt_to_proto(attempt: Attempt) -> cluster_pb2.Attempt:
    return cluster_pb2.Attempt(request_id=attempt.request_id, epoch=attempt.epoch)


def attempt_from_proto(attempt: cluster_pb2.Attempt) -> Attempt:
    return Attempt(request_id=RequestId(attempt.request_id), epoch=attempt.epoch)


def held_to_proto(held: HeldKv) -> cluster_pb2.HeldKv:
    return cluster_pb2.HeldKv(
        attempt=attempt_to_proto(held.attempt),
        first_layer=held.first_layer,
        num_layers=held.num_layers,
        tokens=held.tokens,
    )


def _prefill(prefill: cluster_pb2.Prefill) -> messages.Prefill:
    return messages.Prefill(
        attempt=attempt_from_proto(prefill.attempt),
        prompt=np.array(prefill.prompt, np.int64).astype(np.int32),
        generated=np.array(prefill.generated, np.int64).astype(np.int32),
        generation=_generation(prefill.generation),
        targets=tuple(target_from_proto(target) for target in prefill.targets),
        degraded=prefill.degraded,
        transfer_timeout_s=prefill.transfer_timeout_ms / 1e3,
    )


def _decode(decode: cluster_pb2.Decode) -> messages.Decode:
    return messages.Decode(
        attempt=attempt_from_proto(decode.attempt),
        prompt=np.array(decode.prompt, np.int64).astype(np.int32),
        generated=np.array(decode.generated, np.int64).astype(np.int32),
        generation=_generation(decode.generation),
        kv_timeout_s=decode.kv_timeout_ms / 1e3,
        stages=tuple(_stage(stage) for stage in decode.stages),
        copies=tuple(_copy(copy) for copy in decode.copies),
        resume_from=attempt_from_proto(decode.resume_from) if decode.HasField("resume_from") else None,
        resume_tokens=decode.resume_tokens,
    )


def _hold(hold: cluster_pb2.Hold) -> messages.Hold:
    return messages.Hold(
        attempt=attempt_from_proto(hold.attempt),
        resume_from=attempt_from_proto(hold.resume_from),
        resume_tokens=hold.resume_tokens,
    )


def _generation(generation: cluster_pb2.Generation) -> Generation:
    return Generation(
        sampling=_sampling(generation.sampling),
        max_tokens=generation.max_tokens,
        stop_token_ids=frozenset(generation.stop_token_ids),
        logprobs=generation.logprobs,
    )


def _sampling(sampling: inference_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias),
        seed=sampling.seed,
    )


def target_from_proto(target: cluster_pb2.KvTarget) -> KvTarget:
    return KvTarget(
        node_id=NodeId(target.node_id),
        address=target.address,
        host_id=target.host_id,
        first_layer=target.first_layer,
        num_layers=target.num_layers,
        backup=target.backup,
    )


def _stage(stage: cluster_pb2.Stage) -> Stage:
    return Stage(
        node_id=NodeId(stage.node_id),
        address=stage.address,
        host_id=stage.host_id,
        first_layer=stage.first_layer,
        num_layers=stage.num_layers,
    )


def _copy(copy: cluster_pb2.Copy) -> KvCopy:
    return KvCopy(source=NodeId(copy.source_node_id), target=target_from_proto(copy.target), from_token=copy.from_token)


def _copy_lost(event: messages.CopyLost) -> cluster_pb2.CopyLost:
    return cluster_pb2.CopyLost(
        attempt=attempt_to_proto(event.attempt),
        holder_node_id=event.holder,
        first_layer=event.first_layer,
        num_layers=event.num_layers,
        kind=FAILURE_TO_PROTO[event.kind],
        message=event.message,
    )


def _prefill_done(event: messages.PrefillDone) -> cluster_pb2.PrefillDone:
    first_token = None
    if event.first_token is not None:
        first_token = token_to_proto(event.first_token, with_logprob=event.logprobs)
    return cluster_pb2.PrefillDone(
        attempt=attempt_to_proto(event.attempt), first_token=first_token, prefill_ms=event.prefill_ms
    )


def _tokens(event: messages.Tokens) -> cluster_pb2.Tokens:
    return cluster_pb2.Tokens(
        tokens=[
            cluster_pb2.AttemptToken(
                attempt=attempt_to_proto(generated.attempt),
                token=token_to_proto(generated.token, with_logprob=generated.attempt in event.with_logprob),
            )
            for generated in event.tokens
        ]
    )


def token_to_proto(token: SampledToken, *, with_logprob: bool) -> cluster_pb2.SampledToken:
    return cluster_pb2.SampledToken(
        index=token.index,
        token_id=token.token_id,
        logprob=token.logprob if with_logprob else None,
        finish_reason=_FINISH[token.finish],
    )


def token_from_proto(token: cluster_pb2.SampledToken) -> SampledToken:
    return SampledToken(
        index=token.index, token_id=token.token_id, logprob=token.logprob, finish=_FINISHED[token.finish_reason]
    )


def transfer_to_proto(stats: TransferStats) -> inference_pb2.KvTransfer:
    return inference_pb2.KvTransfer(
        transport=stats.transport,
        codec=stats.codec,
        chunks=stats.chunks,
        bytes=stats.bytes,
        hidden_ms=stats.hidden_ms,
        exposed_ms=stats.exposed_ms,
    )
