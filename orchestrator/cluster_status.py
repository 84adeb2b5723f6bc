"""The cluster as `status` shows it: nodes, what each carries, how far its copies lag, and what happened last."""

from collections.abc import Iterable, Iterator

from edgellm.orchestrator.core.node import Node
from edgellm.orchestrator.core.protection import copy_lag_tokens
from edgellm.orchestrator.core.requests import Decoding, Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.core.values import Layers
from edgellm.orchestrator.driver import Driver
from edgellm.runtime.rpc import inference_pb2


def nodes_to_proto(state: ClusterState, now_s: float) -> list[inference_pb2.NodeStatus]:
    return [_node_status(state, node, now_s) for node in state.nodes]


def events_to_proto(driver: Driver) -> list[inference_pb2.ClusterEvent]:
    now_s = driver.clock()
    return [
        inference_pb2.ClusterEvent(age_ms=1000 * (now_s - happening.time_s), text=happening.text)
        for happening in driver.history
    ]


def _node_status(state: ClusterState, node: Node, now_s: float) -> inference_pb2.NodeStatus:
    """Free blocks are what the node itself counts, so that a leak shows."""
    profile, load = node.profile, node.load
    layers = ", ".join(map(str, _joined(_carried(state, node))))
    return inference_pb2.NodeStatus(
        node_id=profile.node_id,
        incarnation=node.incarnation,
        role=_role(node, layers),
        device_class=profile.device_class,
        engines=[engine.name for engine in profile.engines],
        address=profile.exchange_address,
        state=node.state,
        running=load.running,
        waiting=load.waiting,
        kv_blocks_total=profile.kv_blocks,
        kv_blocks_free=load.kv_blocks_free,
        rss_bytes=load.rss_bytes,
        rss_shared_bytes=load.rss_shared_bytes,
        steps=load.steps,
        pid=profile.pid,
        heartbeat_age_ms=1000 * (now_s - node.last_beat_s),
        layers=layers,
        copies=sum(_holds_copy(request, node) for request in state.requests.values()),
        copy_lag_tokens=copy_lag_tokens(state, node.connection),
    )


def _role(node: Node, layers: str) -> str:
    """What it does now."""
    if not node.profile.spare:
        return node.profile.role
    return f"{node.profile.role} (spare)" if layers else "spare"


def _holds_copy(request: Request, node: Node) -> bool:
    return any(copy.holder == node.connection for copy in request.copies)


def _carried(state: ClusterState, node: Node) -> Iterator[Layers]:
    """For new requests, and for those under way."""
    working = [request.phase.pipeline for request in state.requests.values() if isinstance(request.phase, Decoding)]
    for pipeline in (*state.pipelines(), *working):
        yield from (stage.layers for stage in pipeline if stage.connection == node.connection)


def _joined(ranges: Iterable[Layers]) -> list[Layers]:
    """Neighbours as one range."""
    joined: list[Layers] = []
    for layers in sorted(set(ranges)):
        if joined and joined[-1].end == layers.first:
            layers = Layers(joined[-1].first, joined.pop().count + layers.count)
        joined.append(layers)
    return joined
