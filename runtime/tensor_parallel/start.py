"""Where a node becomes a rank; whatever needs torch is imported here and not before."""

from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeConfig, NodeError
from edgellm.runtime.tensor_parallel.patience import Patience


async def serve_rank(config: NodeConfig, spec: EngineSpec) -> None:
    """Serve as one rank of a tensor-parallel engine until told to stop. Raises NodeError."""
    if config.tp_leader is None:
        raise NodeError(
            f"engine {spec.name} is rank {spec.rank} of {spec.world}, which read prompts together; "
            "give all of them the same --tp-leader HOST:PORT, an address of rank 0's host"
        )
    if spec.rank and config.metrics_port is not None:
        raise NodeError(f"rank {spec.rank} of {spec.name} has no metrics of its own; leave out --metrics-port")
    try:
        from edgellm.runtime.tensor_parallel.follower import follow
        from edgellm.runtime.tensor_parallel.leader import lead
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise NodeError(
            f"engine {spec.name} is rank {spec.rank} of {spec.world}, and ranks are summed by torch, which this node "
            "does not have; install it with: pip install 'edgellm[tp]'"
        ) from error
    serve = lead if spec.rank == 0 else follow
    await serve(config, spec, config.tp_leader, Patience())
