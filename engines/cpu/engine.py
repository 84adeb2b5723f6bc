"""The native CPU engine: a compiled folder, loaded and run."""

import dataclasses
import mmap
import os
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch, Output, SumOverRanks
from edgellm.engines.batch import check_batch
from edgellm.engines.cpu import isa as isas
from edgellm.engines.cpu._native import Executor
from edgellm.engines.cpu.compiler import PLAN_FILE, WEIGHTS_FILE
from edgellm.engines.cpu.plan import BACKEND_VERSION, Plan, View, segments
from edgellm.engines.cpu.replay import Replay, native_runs
from edgellm.engines.kv import HostKvPool
from edgellm.engines.memory import private_memory
from edgellm.engines.spec import EngineLimits, EngineSpec

__all__ = ["BACKEND_VERSION", "CpuEngine"]


class CpuEngine:
    """Engine over `plan.json` and `weights.bin`; weights are mapped read-only and shared between processes."""

    def __init__(
        self,
        folder: Path,
        spec: EngineSpec,
        *,
        pool: HostKvPool,
        threads: int | None = None,
        isa: str | None = None,
        sum_over_ranks: SumOverRanks | None = None,
    ) -> None:
        """`threads` defaults to the cores this process may use, `isa` to the best of `isa.available()`. A
        tensor-parallel rank needs `sum_over_ranks`; what it raises, `forward` raises.

        Raises ValueError if the folder's files are damaged or of another version, or do not fit `spec` and `pool`.
        """
        self.spec = spec
        self.kv = pool
        self.isa = isas.choose(isa)
        self._plan = load_plan(folder)
        _check_spec(self._plan, spec)
        _check_pool(self._plan, pool)
        self._runs = native_runs(self._plan.ops)
        if len(self._runs) > 1 and sum_over_ranks is None:
            raise ValueError(
                f"engine {spec.name} is tensor-parallel rank {spec.rank} of {spec.world}: it runs in a group"
            )
        self._sum_over_ranks = sum_over_ranks
        self._weights = _map_weights(folder / WEIGHTS_FILE, self._plan.weights_bytes)
        self._arena = _allocate_arena(self._plan, spec.limits)
        self._executor: Executor | None = self._build_executor(_thread_count(threads))

    def forward(self, batch: Batch) -> Output:
        """Run one step; see `Engine.forward`."""
        if self._executor is None:
            raise ValueError("the engine is closed")
        batch = _with_exact_types(batch)
        check_batch(batch, self.spec, self.kv)
        self._check_input(batch)
        self._run(self._executor, batch)
        if self._plan.is_last_stage:
            return Output(logits=self._rows(self._plan.output, len(batch.logit_rows)), hidden=None)
        return Output(logits=None, hidden=self._rows(self._plan.output, int(batch.row_starts[-1])))

    def close(self) -> None:
        """Release memory and threads."""
        self._executor = None
        self._arena = np.empty(0, np.uint8)
        self._weights = np.empty(0, np.uint8)

    def _run(self, executor: Executor, batch: Batch) -> None:
        for run in self._runs:
            rows = executor.run(
                tokens=batch.tokens,
                hidden=batch.hidden,
                row_starts=batch.row_starts,
                first_positions=batch.first_positions,
                block_tables=batch.block_tables,
                logit_rows=batch.logit_rows,
                begin=run.begin,
                end=run.end,
            )
            if run.summed is not None and self._sum_over_ranks is not None:
                self._sum_over_ranks(self._rows(run.summed, rows))

    def _build_executor(self, threads: int) -> Executor:
        contract, limits = self._plan.contract, self.spec.limits
        executor = Executor(
            isa=self.isa,
            threads=threads,
            max_rows=limits.max_rows,
            max_sequences=limits.max_sequences,
            arena=self._arena,
            weights=self._weights,
            pool=self.kv.data.reshape(-1),
            num_blocks=self.kv.num_blocks,
            block_bytes=contract.block_bytes,
            kv_heads=contract.kv_heads,
            head_dim=contract.head_dim,
            group=self._plan.group,
        )
        replay = Replay(executor, self._plan.buffers, limits.max_rows, contract.dtype)
        for op in self._plan.ops:
            replay.add(op)
        return executor

    def _check_input(self, batch: Batch) -> None:
        wanted = "tokens" if self._plan.is_first_stage else "hidden"
        if (batch.tokens is None) == self._plan.is_first_stage:
            raise ValueError(f"engine {self.spec.name} takes {wanted}, which the batch does not have")
        if batch.hidden is not None and batch.hidden.shape[1:] != (self._plan.hidden_size,):
            raise ValueError(f"hidden has shape {batch.hidden.shape}, needs [rows, {self._plan.hidden_size}]")

    def _rows(self, view: View, rows: int) -> npt.NDArray[np.float32]:
        """float32 [rows, width] view of the arena."""
        buffer = self._plan.buffers[view.buffer]
        offset = buffer.row_offset * self.spec.limits.max_rows
        values = self._arena[offset : offset + rows * buffer.row_bytes].view(np.float32)
        return values.reshape(rows, buffer.row_bytes // 4)[:, view.column : view.column + view.width]


def load_plan(folder: Path) -> Plan:
    """Read plan.json. ValueError if it is not a plan of this backend version."""
    path = folder / PLAN_FILE
    try:
        version = msgspec.json.decode(path.read_bytes(), type=dict[str, object]).get("backend_version")
        if version != BACKEND_VERSION:
            raise ValueError(f"{path} is for {version}, this is {BACKEND_VERSION}; rebuild it with edgellm-build")
        plan = msgspec.json.decode(path.read_bytes(), type=Plan)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is damaged ({error}); rebuild it with edgellm-build") from error
    if any(not 0 <= segment.offset <= plan.weights_bytes - segment.bytes for segment in segments(plan)):
        raise ValueError(f"{path} is damaged (a weight lies outside of the file); rebuild it with edgellm-build")
    return plan


def _check_spec(plan: Plan, spec: EngineSpec) -> None:
    sizes = (plan.num_layers, plan.hidden_size, plan.vocab_size)
    if sizes != (spec.num_layers, spec.hidden_size, spec.vocab_size):
        raise ValueError(
            f"engine {spec.name}: the plan has layers, hidden and vocabulary size {sizes}, "
            f"engine.json {(spec.num_layers, spec.hidden_size, spec.vocab_size)}"
        )
    if spec.limits.max_seq_len > plan.max_seq_len:
        raise ValueError(
            f"engine {spec.name}: max_seq_len {spec.limits.max_seq_len}, but the plan was compiled "
            f"for {plan.max_seq_len} tokens; rebuild it with edgellm-build"
        )


def _check_pool(plan: Plan, pool: HostKvPool) -> None:
    stored = (plan.contract.kv_heads, plan.contract.head_dim, plan.contract.dtype, plan.contract.block_tokens)
    offered = (pool.contract.kv_heads, pool.contract.head_dim, pool.contract.dtype, pool.contract.block_tokens)
    if stored != offered or len(pool.layers) != plan.num_layers:
        raise ValueError(
            f"the KV pool holds {len(pool.layers)} layers of {offered}, the engine needs {plan.num_layers} of {stored} "
            "(KV heads, head size, type, tokens per block)"
        )


def _map_weights(path: Path, expected_bytes: int) -> npt.NDArray[np.uint8]:
    found = path.stat().st_size
    if found != expected_bytes:
        raise ValueError(f"{path} has {found} bytes, its plan says {expected_bytes}; rebuild it with edgellm-build")
    if not expected_bytes:
        return np.empty(0, np.uint8)
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)


def _allocate_arena(plan: Plan, limits: EngineLimits) -> npt.NDArray[np.uint8]:
    row_bytes = max(buffer.row_offset + buffer.row_bytes for buffer in plan.buffers)
    return private_memory(row_bytes * limits.max_rows)


def _with_exact_types(batch: Batch) -> Batch:
    """The same batch in contiguous int32 and float32; most batches already are."""
    integers = ("row_starts", "first_positions", "block_tables", "logit_rows")
    exact = {name: np.ascontiguousarray(getattr(batch, name), np.int32) for name in integers}
    tokens = None if batch.tokens is None else np.ascontiguousarray(batch.tokens, np.int32)
    hidden = None if batch.hidden is None else np.ascontiguousarray(batch.hidden, np.float32)
    return dataclasses.replace(batch, tokens=tokens, hidden=hidden, **exact)


def _thread_count(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if threads < 1:
        raise ValueError(f"threads is {threads}, must be at least 1")
    return threads
