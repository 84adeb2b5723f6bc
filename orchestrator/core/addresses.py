"""Connections as nodes know each other: by name and address."""

from collections.abc import Iterable

from edgellm.orchestrator.core.nodes import NodeRegistry
from edgellm.orchestrator.core.pipelines import Pipeline
from edgellm.orchestrator.core.takeover import Copy
from edgellm.orchestrator.core.values import ConnectionId, KvCopy, KvTarget, Layers, NodeProfile, StageAddress


def target_of(nodes: NodeRegistry, connection: ConnectionId, layers: Layers, *, backup: bool = False) -> KvTarget:
    profile = _profile(nodes, connection)
    return KvTarget(
        node_id=profile.node_id,
        address=profile.exchange_address,
        host_id=profile.host_id,
        layers=layers,
        backup=backup,
    )


def stages_of(nodes: NodeRegistry, pipeline: Pipeline) -> tuple[StageAddress, ...]:
    return tuple(_stage(_profile(nodes, stage.connection), stage.layers) for stage in pipeline)


def _stage(profile: NodeProfile, layers: Layers) -> StageAddress:
    return StageAddress(
        node_id=profile.node_id, address=profile.exchange_address, host_id=profile.host_id, layers=layers
    )


def copies_of(nodes: NodeRegistry, copies: Iterable[Copy], *, from_token: int) -> tuple[KvCopy, ...]:
    """Each from `from_token` on, or from where it ends, whichever is later."""
    return tuple(
        KvCopy(
            source=_profile(nodes, copy.source).node_id,
            target=target_of(nodes, copy.holder, copy.layers, backup=True),
            from_token=max(from_token, copy.tokens),
        )
        for copy in copies
    )


def _profile(nodes: NodeRegistry, connection: ConnectionId) -> NodeProfile:
    node = nodes.get(connection)
    if node is None:
        raise ValueError(f"connection {connection} is planned for, but its node is dead")
    return node.profile
