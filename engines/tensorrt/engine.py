"""The TensorRT engine behind the engine boundary: ragged batches to padded passes, blocks to slots."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch, Output
from edgellm.engines.batch import check_batch, row_positions
from edgellm.engines.kv import HostKvPool
from edgellm.engines.spec import EngineSpec
from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.manifest import EngineManifest
from edgellm.engines.tensorrt.passes import Pass, Rows, plan_passes
from edgellm.engines.tensorrt.slots import Blocks, SlotTable

Array: TypeAlias = npt.NDArray[Any]
HalfArray: TypeAlias = npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, eq=False)
class PassResult:
    """Valid until the next run."""

    rows: npt.NDArray[np.float32]
    """Logits [selected, vocab_size], or hidden rows [batch, chunk, hidden_size]."""
    kv: HalfArray
    """K and V of the pass's rows, [layers, 2, batch, kv_heads, chunk, head_dim]."""


class Executor(Protocol):
    """Runs an engine's networks on caches of its own."""

    num_slots: int

    def load(self, slot: int, first_token: int, kv: HalfArray) -> None:
        """Overwrite tokens of a slot's caches: [layers, 2 (K, V), kv_heads, tokens, head_dim]."""
        ...

    def run(self, first_slot: int, inputs: Mapping[str, Array]) -> PassResult:
        """One pass over slots `first_slot` and up, whose caches it extends; `inputs` has everything that a network may
        read but the caches."""
        ...

    def close(self) -> None:
        """Release the device's memory."""
        ...


class TensorRtEngine:
    """Engine over an executor.

    A decode engine runs all slots in every pass, so a row's bits do not depend on its company. Those of a prefill
    engine may: kernels are chosen by shape.
    """

    def __init__(self, spec: EngineSpec, manifest: EngineManifest, *, pool: HostKvPool, executor: Executor) -> None:
        """Raises ValueError for a pool whose KV TensorRT cannot keep."""
        if pool.contract.dtype != "fp16":
            raise ValueError(f"engine {spec.name} keeps KV in half precision, the pool in {pool.contract.dtype}")
        self.spec = spec
        self.kv = pool
        self._manifest = manifest
        self._bounds = manifest.bounds
        self._executor = executor
        self._slots = SlotTable(num_slots=executor.num_slots, block_tokens=pool.contract.block_tokens)

    def forward(self, batch: Batch) -> Output:
        """Run one step; see `Engine.forward`."""
        check_batch(batch, self.spec, self.kv)
        self._check_input(batch)
        if not self._manifest.is_last_stage:
            return Output(logits=None, hidden=self._run(batch, np.arange(batch.row_starts[-1])))
        wanted, where = np.unique(batch.logit_rows, return_inverse=True)
        return Output(logits=self._run(batch, wanted)[where], hidden=None)

    def close(self) -> None:
        """Release the device's memory."""
        self._executor.close()

    def _run(self, batch: Batch, wanted: Array) -> npt.NDArray[np.float32]:
        """Results of rows `wanted`, ascending: [wanted, width]."""
        width = self.spec.vocab_size if self._manifest.is_last_stage else self.spec.hidden_size
        result = np.empty((len(wanted), width), np.float32)
        new_kv = np.empty((int(batch.row_starts[-1]), len(self.kv.layers), self.kv.contract.row_bytes), np.uint8)
        sequences = self._place(batch, wanted)
        for planned in plan_passes(sequences, num_slots=self._executor.num_slots, bounds=self._bounds):
            done = self._executor.run(planned.first_slot, self._inputs(planned, batch))
            rows = [row for piece in planned.pieces for row in piece.wanted]
            result[np.searchsorted(wanted, rows)] = self._wanted_rows(planned, done.rows)
            for piece in planned.pieces:
                kv = done.kv[:, :, piece.slot - planned.first_slot, :, : piece.count]
                new_kv[piece.first_row : piece.first_row + piece.count] = _token_rows(kv)
        self._write_through(batch, new_kv, [rows.slot for rows in sequences])
        return result

    def _place(self, batch: Batch, wanted: Array) -> list[Rows]:
        """The batch's sequences, each in a slot that has its earlier tokens."""
        loadings = self._slots.arrange([self._blocks(batch, s, batch.first_positions[s]) for s in _sequences(batch)])
        placed = []
        for s, loading in zip(_sequences(batch), loadings, strict=True):
            first, start, end = int(batch.first_positions[s]), int(batch.row_starts[s]), int(batch.row_starts[s + 1])
            if loading.first_token < first:
                self._load(loading.slot, batch.block_tables[s], np.arange(loading.first_token, first))
            inside = wanted[(wanted >= start) & (wanted < end)]
            placed.append(
                Rows(
                    slot=loading.slot,
                    first_position=first,
                    first_row=start,
                    count=end - start,
                    wanted=tuple(int(row) for row in inside),
                )
            )
        return placed

    def _blocks(self, batch: Batch, sequence: int, tokens: int) -> Blocks:
        """The blocks of a sequence's first tokens, at least one, and their versions."""
        count = max(1, self.kv.contract.blocks_for(int(tokens)))
        blocks = batch.block_tables[sequence, :count]
        versions = self.kv.versions[:, blocks].sum(axis=0)
        return tuple(zip(blocks.tolist(), versions.tolist(), strict=True))

    def _load(self, slot: int, table: Array, positions: Array) -> None:
        """Copy tokens of a sequence from the pool into its slot."""
        contract = self.kv.contract
        blocks, tokens = table[positions // contract.block_tokens], positions % contract.block_tokens
        rows = self.kv.read_rows(blocks.astype(np.intp), tokens.astype(np.intp), self.kv.layers).view(np.float16)
        shape = (len(positions), len(self.kv.layers), 2, contract.kv_heads, contract.head_dim)
        kv = np.ascontiguousarray(rows.reshape(shape).transpose(1, 2, 3, 0, 4))
        self._executor.load(slot, int(positions[0]), kv)

    def _write_through(self, batch: Batch, new_kv: npt.NDArray[np.uint8], slots: list[int]) -> None:
        """The step's rows into the pool; then the slots are known to hold what the pool has."""
        positions, block_tokens = row_positions(batch), self.kv.contract.block_tokens
        sequences = np.repeat(_sequences(batch), np.diff(batch.row_starts))
        blocks = batch.block_tables[sequences, positions // block_tokens].astype(np.intp)
        self.kv.write_rows(blocks, (positions % block_tokens).astype(np.intp), self.kv.layers, new_kv)
        ends = batch.first_positions + np.diff(batch.row_starts)
        for s, slot in zip(_sequences(batch), slots, strict=True):
            self._slots.commit(slot, self._blocks(batch, s, ends[s]))

    def _inputs(self, planned: Pass, batch: Batch) -> dict[str, Array]:
        """Padded to [batch, chunk]. A slot that is not part of the step writes where no sequence reaches and sees one
        token, so its rows cost little and spoil nothing."""
        shape = (planned.batch, planned.chunk)
        source = batch.tokens if batch.hidden is None else batch.hidden
        assert source is not None
        rows = np.zeros((*shape, *source.shape[1:]), np.int32 if batch.hidden is None else np.float32)
        positions = np.zeros(shape, np.int32)
        write_at = np.full(planned.batch, self._bounds.capacity - planned.chunk, np.int32)
        for piece in planned.pieces:
            slot = piece.slot - planned.first_slot
            positions[slot] = piece.first_position + np.arange(planned.chunk)
            write_at[slot] = piece.first_position
            rows[slot, : piece.count] = source[piece.first_row : piece.first_row + piece.count]
        return {
            interface.TOKENS if batch.hidden is None else interface.HIDDEN: rows,
            interface.POSITIONS: positions,
            interface.WRITE_AT: write_at,
            interface.LENGTHS: positions[:, -1] + 1,
            interface.VISIBLE: np.arange(positions.max() + 1, dtype=np.int32),
            interface.SELECTED: np.array(_flat_rows(planned) or [0], np.int32),  # a network wants one at least
        }

    def _wanted_rows(self, planned: Pass, rows: Array) -> Array:
        """[wanted, width] of a pass; a network that can select has done so."""
        flat = _flat_rows(planned)
        if self._manifest.is_last_stage and not self._bounds.is_decode:
            return rows[: len(flat)]
        result: Array = rows.reshape(planned.batch * planned.chunk, -1)[flat]
        return result

    def _check_input(self, batch: Batch) -> None:
        wanted = "tokens" if self._manifest.is_first_stage else "hidden"
        if (batch.tokens is None) == self._manifest.is_first_stage:
            raise ValueError(f"engine {self.spec.name} takes {wanted}, which the batch does not have")
        if batch.hidden is not None and batch.hidden.shape[1:] != (self.spec.hidden_size,):
            raise ValueError(f"hidden has shape {batch.hidden.shape}, needs [rows, {self.spec.hidden_size}]")


def _sequences(batch: Batch) -> range:
    return range(len(batch.first_positions))


def _flat_rows(planned: Pass) -> list[int]:
    """The wanted rows of a pass, in its flattened [batch * chunk]."""
    return [
        (piece.slot - planned.first_slot) * planned.chunk + row - piece.first_row
        for piece in planned.pieces
        for row in piece.wanted
    ]


def _token_rows(kv: HalfArray) -> npt.NDArray[np.uint8]:
    """[layers, 2, kv_heads, tokens, head_dim] -> uint8 [tokens, layers, row_bytes], as the pool has them."""
    rows = np.ascontiguousarray(kv.transpose(3, 0, 1, 2, 4))
    return rows.view(np.uint8).reshape(rows.shape[0], rows.shape[1], -1)
