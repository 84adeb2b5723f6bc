"""EdgeLLM's own CPU engine, under the same rules as its peers. Its KV is filled with random numbers, not by prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from driver_protocol import Runner, random_tokens, seconds_of, serve

from edgellm.engines.base import Batch
from edgellm.engines.cpu.engine import CpuEngine, load_plan
from edgellm.engines.kv import BlockId, HostKvPool, KvContract
from edgellm.engines.spec import EngineSpec


class EdgellmRunner:
    """Sequence s keeps its KV in blocks of its own; a run starts from the same positions every time."""

    def __init__(self, job: dict[str, Any]) -> None:
        folder = Path(job["model"])
        spec = msgspec.json.decode((folder / "engine.json").read_bytes(), type=EngineSpec)
        contract = load_plan(folder).contract
        pool = HostKvPool(contract, range(spec.num_layers), contract.blocks_for(job["kv_tokens"]))
        self._engine = CpuEngine(folder, spec, pool=pool, threads=job["threads"])
        self._filled = 0

    def prefill(self, tokens: int) -> float:
        prompt = random_tokens(tokens, self._engine.spec.vocab_size)
        return seconds_of(lambda: self._read(prompt))

    def decode(self, batch: int, context: int, steps: int) -> float:
        blocks = self._engine.kv.contract.blocks_for(context + steps)
        self._fill(batch * blocks)
        return seconds_of(lambda: self._steps(batch, blocks, range(context, context + steps)))

    def _read(self, prompt: list[int]) -> None:
        """In the largest steps that the engine takes; logits of the last token only."""
        blocks, rows = self._engine.kv.contract.blocks_for(len(prompt)), self._engine.spec.limits.max_rows
        for start in range(0, len(prompt), rows):
            batch = self._batch(1, blocks, start, prompt[start : start + rows])
            if start + rows < len(prompt):
                self._engine.forward(replace(batch, logit_rows=np.empty(0, np.int32)))
            else:
                self._likeliest(batch)

    def _steps(self, sequences: int, blocks: int, positions: range) -> None:
        tokens: npt.NDArray[np.intp] | list[int] = [1] * sequences
        for position in positions:
            tokens = self._likeliest(self._batch(sequences, blocks, position, tokens))

    def _likeliest(self, batch: Batch) -> npt.NDArray[np.intp]:
        """[sequences] the likeliest next tokens."""
        logits = self._engine.forward(batch).logits
        assert logits is not None
        return logits.argmax(axis=1)

    def _batch(self, sequences: int, blocks: int, position: int, tokens: npt.NDArray[np.intp] | list[int]) -> Batch:
        """Equally many rows of each sequence, from `position` on; `blocks`: of each sequence."""
        starts = np.arange(0, len(tokens) + 1, len(tokens) // sequences, dtype=np.int32)
        return Batch(
            tokens=np.asarray(tokens, np.int32),
            hidden=None,
            row_starts=starts,
            first_positions=np.full(sequences, position, np.int32),
            block_tables=np.arange(sequences * blocks, dtype=np.int32).reshape(sequences, blocks),
            logit_rows=starts[1:] - 1,
        )

    def _fill(self, blocks: int) -> None:
        """KV as of a prompt: numbers near zero."""
        pool = self._engine.kv
        for block in range(self._filled, blocks):
            data = _random_block(pool.contract, block)
            for layer in pool.layers:
                pool.write([BlockId(block)], layer, data)
        self._filled = max(self._filled, blocks)


def _random_block(contract: KvContract, seed: int) -> npt.NDArray[np.uint8]:
    """uint8 [1, block_bytes]; in 8 bits, the values of one vector share a scale."""
    values = np.random.default_rng(seed).normal(0, 0.1, 2 * contract.values_per_block)
    if contract.dtype == "fp16":
        return values.astype(np.float16).view(np.uint8)[None]
    scale = 0.5 / 127
    scales = np.full(2 * contract.block_tokens * contract.kv_heads, scale, np.float16)
    whole = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    return np.concatenate([whole.view(np.uint8), scales.view(np.uint8)])[None]


def load(job: dict[str, Any]) -> Runner:
    return EdgellmRunner(job)


if __name__ == "__main__":
    serve(load)
