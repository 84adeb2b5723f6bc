"""From a compiled folder to a running engine."""

import dataclasses
from pathlib import Path

from edgellm.engines.base import SumOverRanks
from edgellm.engines.kv import HostKvPool
from edgellm.engines.spec import EngineSpec
from edgellm.engines.tensorrt.api import TensorRtError
from edgellm.engines.tensorrt.device import DeviceNetworks
from edgellm.engines.tensorrt.engine import TensorRtEngine
from edgellm.engines.tensorrt.manifest import EngineManifest, read_manifest


def load_engine(
    folder: Path, spec: EngineSpec, pool: HostKvPool, sum_over_ranks: SumOverRanks | None
) -> TensorRtEngine:
    """With limits that follow from the pool: each slot takes the KV of a whole sequence.

    Raises TensorRtError, a ValueError, where the device or the module is not what the engine was built for.
    """
    manifest = read_manifest(folder)
    _refuse_sums_inside(spec, manifest)
    slots = slots_for(manifest, pool)
    executor = DeviceNetworks(folder, manifest, num_slots=slots, sum_over_ranks=sum_over_ranks)
    limits = dataclasses.replace(spec.limits, max_sequences=slots)
    return TensorRtEngine(dataclasses.replace(spec, limits=limits), manifest, pool=pool, executor=executor)


def _refuse_sums_inside(spec: EngineSpec, manifest: EngineManifest) -> None:
    """A network that adds up over ranks itself does so with NCCL, for which nothing here makes a communicator."""
    if any("dist_collective" in network.layers for network in manifest.networks):
        raise TensorRtError(
            f"engine {spec.name} is rank {spec.rank} of {spec.world} and sums over NCCL inside of its network, which "
            "is not supported; build with prefill devices that hold the whole model, or with --backend-prefill cpu"
        )


def slots_for(manifest: EngineManifest, pool: HostKvPool) -> int:
    """As many slots as whole sequences fit into the pool: one at least, and no more than the networks take."""
    blocks = pool.contract.blocks_for(manifest.bounds.max_seq_len)
    return max(1, min(manifest.bounds.max_batch, pool.num_blocks // blocks))
