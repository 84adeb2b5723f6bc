"""What the core decides, as messages to nodes and clients. Nothing is decided here."""

from typing import assert_never

from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.values import (
    AttemptId,
    FinishReason,
    Generation,
    KvCopy,
    KvTarget,
    PrefillPath,
    RequestStats,
    SampledToken,
    Sampling,
    StageAddress,
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


def command_to_proto(
    command: commands.WelcomeNode
    | commands.StartPrefill
    | commands.StartDecode
    | commands.HoldCopies
    | commands.ProtectAttempt
    | commands.ReleaseAttempt,
    heartbeat_interval_s: float,
) -> cluster_pb2.Command:
    match command:
        case commands.WelcomeNode():
            welcome = cluster_pb2.Welcome(
                incarnation=command.incarnation,
                heartbeat_interval_ms=round(1000 * heartbeat_interval_s),
                first_epoch=command.first_epoch,
            )
            return cluster_pb2.Command(welcome=welcome)
        case commands.StartPrefill():
            return cluster_pb2.Command(prefill=_prefill_to_proto(command))
        case commands.StartDecode():
            return cluster_pb2.Command(decode=_decode_to_proto(command))
        case commands.HoldCopies():
            return cluster_pb2.Command(hold=_hold_to_proto(command))
        case commands.ProtectAttempt(attempt=attempt, copies=copies):
            protect = cluster_pb2.Protect(attempt=attempt_to_proto(attempt), copies=map(_copy_to_proto, copies))
            return cluster_pb2.Command(protect=protect)
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
        stages=map(_stage_to_proto, command.stages),
        copies=map(_copy_to_proto, command.copies),
        resume_from=attempt_to_proto(command.resume_from) if command.resume_from is not None else None,
        resume_tokens=command.resume_tokens,
    )


def _hold_to_proto(command: commands.HoldCopies) -> cluster_pb2.Hold:
    return cluster_pb2.Hold(
        attempt=attempt_to_proto(command.attempt),
        resume_from=attempt_to_proto(command.resume_from),
        resume_tokens=command.resume_tokens,
    )


def _stage_to_proto(stage: StageAddress) -> cluster_pb2.Stage:
    return cluster_pb2.Stage(
        node_id=stage.node_id,
        address=stage.address,
        host_id=stage.host_id,
        first_layer=stage.layers.first,
        num_layers=stage.layers.count,
    )


def _copy_to_proto(copy: KvCopy) -> cluster_pb2.Copy:
    return cluster_pb2.Copy(
        source_node_id=copy.source, target=_target_to_proto(copy.target), from_token=copy.from_token
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
        first_layer=target.layers.first,
        num_layers=target.layers.count,
        backup=target.backup,
    )


def token_to_proto(token: SampledToken, text: str) -> inference_pb2.Token:
    return inference_pb2.Token(index=token.index, token_id=token.token_id, text=text, logprob=token.logprob)


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
        recovery=inference_pb2.Recovery(
            total_ms=stats.recovery.total_ms,
            detect_ms=stats.recovery.detect_ms,
            fence_ms=stats.recovery.fence_ms,
            restore_ms=stats.recovery.restore_ms,
            first_token_ms=stats.recovery.first_token_ms,
        ),
    )
