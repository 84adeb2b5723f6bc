"""Between the messages of `tensor_parallel.proto` and this node's own types."""

from typing import get_args

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch
from edgellm.engines.kv import BlockId
from edgellm.runtime.kv.transfer import TransferError, TransferFailure, TransferJob
from edgellm.runtime.kv.types import KvTarget, TransferStats
from edgellm.runtime.rpc import cluster_pb2, inference_pb2
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.wire import (
    FAILURE_TO_PROTO,
    attempt_from_proto,
    attempt_to_proto,
    target_from_proto,
    transfer_to_proto,
)

_KINDS: tuple[TransferFailure, ...] = get_args(TransferFailure)
_FAILURE_FROM_PROTO = {FAILURE_TO_PROTO[kind]: kind for kind in _KINDS}


def step_to_proto(batch: Batch) -> pb.RankStep:
    """Of a first stage: its input is tokens."""
    assert batch.tokens is not None
    return pb.RankStep(
        tokens=_bytes(batch.tokens),
        row_starts=_bytes(batch.row_starts),
        first_positions=_bytes(batch.first_positions),
        block_tables=_bytes(batch.block_tables),
        logit_rows=_bytes(batch.logit_rows),
    )


def batch_from_proto(step: pb.RankStep) -> Batch:
    first_positions = _integers(step.first_positions)
    return Batch(
        tokens=_integers(step.tokens),
        hidden=None,
        row_starts=_integers(step.row_starts),
        first_positions=first_positions,
        block_tables=_integers(step.block_tables).reshape(len(first_positions), -1),
        logit_rows=_integers(step.logit_rows),
    )


def transfer_job_to_proto(transfer_id: int, job: TransferJob, target: KvTarget) -> pb.RankTransfer:
    """One target of a job."""
    return pb.RankTransfer(
        transfer_id=transfer_id,
        attempt=attempt_to_proto(job.attempt),
        prompt_tokens=job.prompt_tokens,
        capacity_tokens=job.capacity_tokens,
        blocks=job.blocks,
        target=cluster_pb2.KvTarget(
            node_id=target.node_id,
            address=target.address,
            host_id=target.host_id,
            first_layer=target.first_layer,
            num_layers=target.num_layers,
            backup=target.backup,
        ),
        timeout_ms=round(1e3 * job.timeout_s),
    )


def transfer_job_from_proto(transfer: pb.RankTransfer) -> TransferJob:
    return TransferJob(
        attempt=attempt_from_proto(transfer.attempt),
        prompt_tokens=transfer.prompt_tokens,
        capacity_tokens=transfer.capacity_tokens,
        blocks=[BlockId(block) for block in transfer.blocks],
        targets=(target_from_proto(transfer.target),),
        timeout_s=transfer.timeout_ms / 1e3,
    )


def sent_to_proto(transfer_id: int, stats: TransferStats) -> pb.RankMessage:
    return pb.RankMessage(sent=pb.RankSent(transfer_id=transfer_id, transfer=transfer_to_proto(stats)))


def stats_from_proto(transfer: inference_pb2.KvTransfer) -> TransferStats:
    return TransferStats(
        transport=transfer.transport,
        codec=transfer.codec,
        chunks=transfer.chunks,
        bytes=transfer.bytes,
        hidden_ms=transfer.hidden_ms,
        exposed_ms=transfer.exposed_ms,
    )


def failed_to_proto(transfer_id: int, error: TransferError) -> pb.RankMessage:
    failed = pb.RankFailed(transfer_id=transfer_id, kind=FAILURE_TO_PROTO[error.kind], message=str(error))
    return pb.RankMessage(failed=failed)


def error_from_proto(failed: pb.RankFailed, target: KvTarget) -> TransferError:
    return TransferError(_FAILURE_FROM_PROTO.get(failed.kind, "transfer"), target.node_id, failed.message)


def _bytes(array: npt.NDArray[np.int32]) -> bytes:
    return array.astype("<i4", copy=False).tobytes()


def _integers(data: bytes) -> npt.NDArray[np.int32]:
    return np.frombuffer(data, "<i4").astype(np.int32, copy=False)
