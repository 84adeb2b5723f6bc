"""The decode engines of a node: one per stage that the bundle's plan cut, and any run of them as one engine."""

import dataclasses
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from edgellm.engines.base import Batch, Engine, Output
from edgellm.engines.kv import KvPool
from edgellm.engines.load import engine_layers
from edgellm.engines.spec import EngineLimits

_LARGEST_HALF: Final = float(np.finfo(np.float16).max)


def to_half(hidden: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Hidden states as they go from stage to stage, wherever the two stages are: IEEE half, saturated. A copy."""
    return np.clip(hidden, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)


class StageRun:
    """Adjacent stages as one Engine. Hidden states are rounded between them as they are between nodes."""

    def __init__(self, stages: Sequence[Engine], pool: KvPool) -> None:
        """`stages` in order, at least one; `pool` has the layers of all of them."""
        specs = [stage.spec for stage in stages]
        self._stages = tuple(stages)
        self.kv = pool
        self.spec = dataclasses.replace(
            specs[0],
            name="+".join(spec.name for spec in specs),
            num_layers=sum(spec.num_layers for spec in specs),
            limits=EngineLimits(
                max_rows=min(spec.limits.max_rows for spec in specs),
                max_sequences=min(spec.limits.max_sequences for spec in specs),
                max_seq_len=min(spec.limits.max_seq_len for spec in specs),
            ),
        )

    def forward(self, batch: Batch) -> Output:
        """Run one step through all stages; see `Engine.forward`."""
        output = self._stages[0].forward(batch)
        for stage in self._stages[1:]:
            if output.hidden is None:
                raise ValueError(f"engine {stage.spec.name} follows one that has no hidden states")
            hidden = to_half(output.hidden).astype(np.float32)
            output = stage.forward(dataclasses.replace(batch, tokens=None, hidden=hidden))
        return output

    def close(self) -> None:
        """The stages belong to the node's StageEngines."""


class StageEngines:
    """The decode stages that a node has engines for, on its one pool. Not all of them may be there."""

    def __init__(self, stages: Sequence[Engine], pool: KvPool) -> None:
        self.stages: Final = tuple(sorted(stages, key=lambda stage: stage.spec.first_layer))
        self.pool: Final = pool
        self._runs: dict[range, Engine | None] = {}

    @property
    def whole(self) -> Engine | None:
        """All layers of the model, where this node could carry all of them."""
        return self.of(range(self.pool.contract.num_layers))

    def of(self, layers: range) -> Engine | None:
        """An engine for exactly these layers, or None where no run of this node's stages makes them up."""
        if layers not in self._runs:
            self._runs[layers] = self._make(layers)
        return self._runs[layers]

    def close(self) -> None:
        for stage in self.stages:
            stage.close()

    def _make(self, layers: range) -> Engine | None:
        run = [stage for stage in self.stages if engine_layers(stage.spec).start in layers]
        covered = [layer for stage in run for layer in engine_layers(stage.spec)]
        if covered != list(layers):
            return None
        return run[0] if len(run) == 1 else StageRun(run, self.pool)
