"""Graph and weights -> `plan.json` and `weights.bin`."""

from collections.abc import Callable
from pathlib import Path

from edgellm.engines.graph import Graph
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import WeightStore


def compile_engine(
    graph: Graph,
    weights: WeightStore,
    *,
    contract: KvContract,
    limits: EngineLimits,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `plan.json` and `weights.bin` into `folder`; equal inputs give equal bytes.

    Each weight is looked up once and packed alone. `progress(done, total)` is called after each packed weight.
    Raises ValueError for a graph this backend cannot run, or a weight that does not fit its op.
    """
    raise NotImplementedError
