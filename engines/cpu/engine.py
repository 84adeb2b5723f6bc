"""The native CPU engine: a compiled folder, loaded and run."""

from pathlib import Path

from edgellm.engines.base import Batch, Output
from edgellm.engines.kv import HostKvPool
from edgellm.engines.spec import EngineSpec

BACKEND_VERSION = "cpu-1"


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
    ) -> None:
        """`threads` defaults to the cores this process may use, `isa` to the best of `isa.available()`."""
        self.spec = spec
        self.kv = pool
        raise NotImplementedError

    def forward(self, batch: Batch) -> Output:
        """Run one step; see `Engine.forward`."""
        raise NotImplementedError

    def close(self) -> None:
        """Release memory and threads."""
        raise NotImplementedError
