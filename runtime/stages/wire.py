"""Between protobuf messages and steps between stages."""

import struct
import zlib
from collections.abc import Iterable

import numpy as np

from edgellm.runtime.rpc import stage_pb2
from edgellm.runtime.stages.messages import StageResult, StageSegment, StageStep
from edgellm.runtime.wire import attempt_from_proto, attempt_to_proto, token_from_proto, token_to_proto

_HALF = np.dtype("<f2")
_STEP_ID = struct.Struct("<Q")
_SAMPLE = struct.Struct("<?IIfi")
"""Lost, index, token id, logprob, finish reason."""


def step_to_proto(step: StageStep) -> stage_pb2.StageStep:
    hidden = step.hidden.astype(_HALF, copy=False).tobytes()
    return stage_pb2.StageStep(
        step_id=step.step_id,
        stage=step.stage,
        segments=[
            stage_pb2.StageSegment(
                attempt=attempt_to_proto(segment.attempt),
                first_position=segment.first_position,
                rows=segment.rows,
                sample=segment.sample,
            )
            for segment in step.segments
        ],
        hidden=hidden,
        checksum=zlib.crc32(hidden),
    )


def step_from_proto(step: stage_pb2.StageStep) -> StageStep:
    """Raises ValueError for a step whose hidden states do not fit its segments, or arrived damaged."""
    segments = tuple(
        StageSegment(
            attempt=attempt_from_proto(segment.attempt),
            first_position=segment.first_position,
            rows=segment.rows,
            sample=segment.sample,
        )
        for segment in step.segments
    )
    rows = sum(segment.rows for segment in segments)
    if not rows or len(step.hidden) % (2 * rows):
        raise ValueError(f"a step of {rows} rows came with {len(step.hidden)} bytes of hidden states")
    if zlib.crc32(step.hidden) != step.checksum:
        raise ValueError(f"checksum of the hidden states of step {step.step_id} is wrong")
    hidden = np.frombuffer(step.hidden, _HALF).reshape(rows, -1)
    return StageStep(step_id=step.step_id, stage=step.stage, segments=segments, hidden=hidden)


def result_to_proto(result: StageResult) -> stage_pb2.StageResult:
    samples = [
        stage_pb2.StageSample(lost=True)
        if token is None
        else stage_pb2.StageSample(token=token_to_proto(token, with_logprob=True))
        for token in result.samples
    ]
    checksum = _checksum(result.step_id, samples)
    return stage_pb2.StageResult(step_id=result.step_id, samples=samples, error=result.error, checksum=checksum)


def result_from_proto(result: stage_pb2.StageResult) -> StageResult:
    """Raises ValueError for one that arrived damaged."""
    if _checksum(result.step_id, result.samples) != result.checksum:
        raise ValueError(f"checksum of the samples of step {result.step_id} is wrong")
    samples = tuple(None if sample.lost else token_from_proto(sample.token) for sample in result.samples)
    return StageResult(step_id=result.step_id, samples=samples, error=result.error)


def _checksum(step_id: int, samples: Iterable[stage_pb2.StageSample]) -> int:
    checksum = zlib.crc32(_STEP_ID.pack(step_id))
    for sample in samples:
        token = sample.token
        fields = (sample.lost, token.index, token.token_id, token.logprob, token.finish_reason)
        checksum = zlib.crc32(_SAMPLE.pack(*fields), checksum)
    return checksum
