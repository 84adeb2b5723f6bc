"""edgellm status: the nodes as a table and what happened last, once or live."""

import argparse
import time
from collections.abc import Sequence

import grpc
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from edgellm.orchestrator.client import connect
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

REFRESH_S = 0.5
CALL_TIMEOUT_S = 5.0
EVENTS_SHOWN = 12
MIB = 1 << 20
_COLOURS = {"ready": "green", "suspect": "yellow", "draining": "yellow", "dead": "red"}
_COLUMNS = (
    *("node", "role", "layers", "device", "state", "run", "wait"),
    *("KV free", "copies", "lag", "RSS MiB", "shared", "steps"),
)
_WIDTH_IN_A_FILE = 160


def status(args: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_IN_A_FILE
    with connect(args.server) as stub:
        first = _fetch(stub)
        if not args.watch:
            console.print(_render(first))
        elif console.is_terminal:
            _watch_live(console, stub, first)
        else:
            _watch_lines(console, stub, first)
    return 0


def _watch_live(
    console: Console, stub: inference_pb2_grpc.InferenceStub, cluster: inference_pb2.GetClusterResponse
) -> None:
    """Until interrupted. While nobody answers, the last state is shown, and that it is old."""
    with Live(_render(cluster), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_S)
            fresh = _fetch_if_there(stub)
            cluster = cluster if fresh is None else fresh
            lost = () if fresh is not None else (Text("the orchestrator does not answer", style="red"),)
            live.update(Group(*lost, _render(cluster)), refresh=True)


def _watch_lines(
    console: Console, stub: inference_pb2_grpc.InferenceStub, cluster: inference_pb2.GetClusterResponse
) -> None:
    """Into a file: the table once, then a line for everything that happens, until interrupted."""
    console.print(_render(cluster))
    told, summary = [event.text for event in cluster.events], _summary(cluster)
    while True:
        time.sleep(REFRESH_S)
        fresh = _fetch_if_there(stub)
        if fresh is None:
            continue
        texts = [event.text for event in fresh.events]
        changed = [_summary(fresh)] if _summary(fresh) != summary else []
        for line in (*what_is_new(told, texts), *changed):
            print(time.strftime("%H:%M:%S"), line, flush=True)
        told, summary = texts, _summary(fresh)


def what_is_new(before: Sequence[str], now: Sequence[str]) -> Sequence[str]:
    """Of two views of one growing list, of which only the end is kept, what the later one adds."""
    for kept in range(min(len(before), len(now)), 0, -1):
        if before[-kept:] == now[:kept]:
            return now[kept:]
    return now


def _fetch(stub: inference_pb2_grpc.InferenceStub) -> inference_pb2.GetClusterResponse:
    return stub.GetCluster(inference_pb2.GetClusterRequest(), timeout=CALL_TIMEOUT_S)


def _fetch_if_there(stub: inference_pb2_grpc.InferenceStub) -> inference_pb2.GetClusterResponse | None:
    try:
        return _fetch(stub)
    except grpc.RpcError as error:
        gone = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        if isinstance(error, grpc.Call) and error.code() in gone:
            return None
        raise


def _render(cluster: inference_pb2.GetClusterResponse) -> RenderableType:
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in table.columns:
        column.overflow = "fold"
    for node in sorted(cluster.nodes, key=lambda node: (node.role != "prefill", node.node_id)):
        table.add_row(*_cells(node))
    events = [Text(f"{_ago(event.age_ms):>9} ago  {event.text}") for event in cluster.events[-EVENTS_SHOWN:]]
    return Group(Text(_summary(cluster)), table, *events)


def _summary(cluster: inference_pb2.GetClusterResponse) -> str:
    return (
        f"{cluster.model}, bundle {cluster.bundle_sha256[:12]}: {cluster.queued} queued, {cluster.prefilling} "
        f"prefilling, {cluster.decoding} decoding, {cluster.finished} finished"
    )


def _ago(age_ms: float) -> str:
    return f"{age_ms / 1e3:.1f} s" if age_ms < 100_000 else f"{age_ms / 60e3:.0f} min"


def _cells(node: inference_pb2.NodeStatus) -> tuple[RenderableType, ...]:
    age = f" ({node.heartbeat_age_ms / 1e3:.1f} s)" if node.state in ("suspect", "dead") else ""
    return (
        f"{node.node_id} #{node.incarnation}",
        node.role,
        node.layers,
        node.device_class,
        Text(node.state + age, style=_COLOURS.get(node.state, "")),
        str(node.running),
        str(node.waiting),
        f"{node.kv_blocks_free}/{node.kv_blocks_total}",
        str(node.copies),
        str(node.copy_lag_tokens),
        f"{node.rss_bytes / MIB:.0f}",
        f"{node.rss_shared_bytes / MIB:.0f}",
        str(node.steps),
    )
