"""How a node introduces itself to the orchestrator."""

import os
from collections.abc import Sequence

from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeConfig
from edgellm.runtime.kv.types import HeldKv
from edgellm.runtime.loading import NodeEngines
from edgellm.runtime.rpc import cluster_pb2
from edgellm.runtime.wire import held_to_proto


def introduce(
    config: NodeConfig,
    engines: NodeEngines,
    *,
    exchange_address: str,
    host_id: str,
    held: Sequence[HeldKv],
    highest_epoch: int,
) -> cluster_pb2.Hello:
    """What it can do, where it is reached, and what it knows of an orchestrator's requests."""
    contract = engines.contract
    return cluster_pb2.Hello(
        node_id=config.node_id,
        pid=os.getpid(),
        role=engines.role,
        device_class=engines.all[0].spec.device_class,
        bundle_sha256=engines.bundle_sha256,
        kv_contract_sha256=contract.sha256,
        engines=[_engine_info(engine.spec, planned=engine.spec.name == engines.planned) for engine in engines.all],
        kv_blocks=engines.pool.num_blocks,
        block_tokens=contract.block_tokens,
        exchange_address=exchange_address,
        host_id=host_id,
        kv_bytes_per_token=contract.bytes_per_token,
        spare=config.spare,
        held=[held_to_proto(one) for one in held],
        highest_epoch=highest_epoch,
    )


def _engine_info(spec: EngineSpec, *, planned: bool) -> cluster_pb2.EngineInfo:
    return cluster_pb2.EngineInfo(
        name=spec.name,
        phase=spec.phase,
        first_layer=spec.first_layer,
        num_layers=spec.num_layers,
        rank=spec.rank,
        world=spec.world,
        precision=spec.precision,
        max_rows=spec.limits.max_rows,
        max_sequences=spec.limits.max_sequences,
        max_seq_len=spec.limits.max_seq_len,
        planned=planned,
    )
