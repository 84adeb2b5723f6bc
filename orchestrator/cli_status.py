"""edgellm status: the nodes as a table, once or live."""

import argparse
import time

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgellm.orchestrator.client import connect
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

REFRESH_S = 0.5
CALL_TIMEOUT_S = 5.0
MIB = 1 << 20
_COLOURS = {"ready": "green", "suspect": "yellow", "dead": "red"}
_COLUMNS = ("node", "role", "device", "engines", "state", "run", "wait", "KV free", "RSS MiB", "shared", "steps")
_WIDTH_IN_A_FILE = 160


def status(args: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_IN_A_FILE
    with connect(args.server) as stub:
        if not args.watch:
            console.print(_render(_fetch(stub)))
            return 0
        with Live(_render(_fetch(stub)), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(REFRESH_S)
                live.update(_render(_fetch(stub)), refresh=True)


def _fetch(stub: inference_pb2_grpc.InferenceStub) -> inference_pb2.GetClusterResponse:
    return stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=CALL_TIMEOUT_S)


def _render(cluster: inference_pb2.GetClusterResponse) -> RenderableType:
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns:
        column.overflow = "fold"
    for node in sorted(cluster.nodes, key=lambda node: (node.role != "prefill", node.node_id)):
        table.add_row(*_cells(node))
    summary = (
        f"{cluster.model}, bundle {cluster.bundle_sha256[:12]}: {cluster.queued} queued, {cluster.prefilling} "
        f"prefilling, {cluster.decoding} decoding, {cluster.finished} finished"
    )
    return Group(Text(summary), table)


def _cells(node: inference_pb2.NodeStatus) -> tuple[RenderableType, ...]:
    age = f" ({node.heartbeat_age_ms / 1e3:.1f} s)" if node.state != "ready" else ""
    return (
        f"{node.node_id} #{node.incarnation}",
        node.role,
        node.device_class,
        ", ".join(node.engines),
        Text(node.state + age, style=_COLOURS.get(node.state, "")),
        str(node.running),
        str(node.waiting),
        f"{node.kv_blocks_free}/{node.kv_blocks_total}",
        f"{node.rss_bytes / MIB:.0f}",
        f"{node.rss_shared_bytes / MIB:.0f}",
        str(node.steps),
    )
