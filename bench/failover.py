"""What a failure costs running requests: pauses with hot copies, with token replay, and after beginning again.

Real processes on one machine: an orchestrator, and a node for each engine of the bundle's plan and one spare. Clients
ask for long answers; when all of them are in the middle, the node of the last decode stage is killed (or stopped), and
each client's pause is the time until its next token. The same prompts, cluster and kill for

* hot copy: ours; the spare takes over from its copy;
* token replay: without copies the prompt is read again and the known tokens are replayed (as NVIDIA Dynamo does);
* begin again: clients ask anew and wait for the token after the last one they had (as with vLLM, SGLang, llama.cpp).
"""

import argparse
import contextlib
import random
import signal
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from bench.failover_chart import draw
from bench.recovery import (
    Pause,
    Reader,
    again,
    end_readers,
    pauses_of,
    start_readers,
    wait_until,
    wait_until_finished,
)
from bench.report import Report, Target, machine
from edgellm.orchestrator.bundle import ServedBundle, open_bundle
from edgellm.orchestrator.local_nodes import LocalNode, planned_nodes
from edgellm.orchestrator.process_cluster import ORCHESTRATOR, ProcessCluster

TOKEN_IDS: Final = range(300, 500)
CLIENTS: Final = 8
ORCHESTRATOR_CLIENTS: Final = 16
ORCHESTRATOR_TOKENS: Final = 128
"""Of each answer that goes on over a restart of the orchestrator."""
CALM_TOKENS: Final = 320
"""That every client reads when nothing fails: more than any has when something does."""
STEADY_TOKENS: Final = 128
"""Of each client, for throughput with and without copies."""
FIRST_METRICS_PORT: Final = 19_400
"""Below the ports that the system gives to whoever asks for any."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Medians over all clients of all rounds, and the 99th percentile of the pause; milliseconds."""

    event: str
    way: str
    context: int
    requests: int
    pause_ms: float = 0.0
    pause_p99_ms: float = 0.0
    detect_ms: float = 0.0
    fence_ms: float = 0.0
    restore_ms: float = 0.0
    first_token_ms: float = 0.0
    tokens_per_s: float = 0.0
    copied_bytes_per_token: float = 0.0
    of_no_copies: float = 0.0
    """Tokens per second over those without copies, the median of rounds."""


@dataclass(frozen=True, kw_only=True)
class _Steady:
    tokens_per_s: float
    copied_bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One bundle, served again and again."""

    bundle: ServedBundle
    rounds: int
    calm: dict[int, list[list[int]]] = field(default_factory=dict)
    """For each context, what the clients read when nothing fails."""

    def cluster(self, folder: str, context: int, clients: int, *, copies: bool) -> ProcessCluster:
        """Every node could hold all requests at once, and a copy of each."""
        tokens = clients * (context + self.max_tokens(context))
        blocks = 2 * -(-tokens // self.bundle.index.kv.block_tokens) + 2 * clients
        nodes = {}
        for node, port in zip(self.nodes(), self.metrics_ports(copies=copies), strict=True):
            options = ["--kv-blocks", str(blocks), "--metrics-port", str(port)]
            options += ["--spare"] if node.spare else []
            nodes[node.node_id] = (node.engine, *options)
        options = () if copies else ("--no-hot-copies",)
        return ProcessCluster(self.bundle.folder, Path(folder), nodes, serve_options=options)

    def nodes(self) -> list[LocalNode]:
        return planned_nodes(self.bundle.index.plan, spares=1)

    def metrics_ports(self, *, copies: bool) -> range:
        """One for each node; a cluster with copies and one without may run at once."""
        num_nodes = len(self.nodes())
        first = FIRST_METRICS_PORT + (0 if copies else num_nodes)
        return range(first, first + num_nodes)

    def max_tokens(self, context: int) -> int:
        """Enough that nobody is done while others still wait for their first token."""
        return min(1024, self.bundle.index.model.max_seq_len - context)

    def prompts(self, context: int, clients: int) -> list[list[int]]:
        chance = random.Random(context)
        return [chance.choices(TOKEN_IDS, k=context) for _ in range(clients)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path(".demo/smollm2-135m"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (%(default)s)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 3072], help="prompt tokens (%(default)s)")
    parser.add_argument("--chart", type=Path, help="write a chart here, where matplotlib is installed")


def run(options: argparse.Namespace) -> Report:
    """Raises ClusterStartError, and ValueError if a request fails: then there is nothing to report."""
    bench = Bench(bundle=open_bundle(options.bundle), rounds=options.rounds)
    rows, differing = [], 0
    for context in options.contexts:
        for way in ("hot copy", "token replay", "begin again"):
            row, changed = _failures(bench, context, way, signal.SIGKILL)
            rows.append(row)
            differing += changed
    stopped, changed = _failures(bench, options.contexts[0], "hot copy", signal.SIGSTOP)
    restarted, also_changed = _orchestrator_failures(bench)
    rows += [stopped, restarted, *_steady(bench, options.contexts[0])]
    if options.chart is not None:
        draw([(row.way, row.context, row.pause_ms) for row in rows if row.event == "SIGKILL of a stage"], options.chart)
    return Report(
        name="failover",
        machine=machine(),
        results=[{one.name: getattr(row, one.name) for one in fields(Row)} for row in rows],
        targets=_targets(rows, differing + changed + also_changed),
    )


def _failures(bench: Bench, context: int, way: str, number: signal.Signals) -> tuple[Row, int]:
    """The row, and how many clients got other tokens than in the round before anything failed."""
    pauses: list[Pause] = []
    differing = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        bench.cluster(folder, context, CLIENTS, copies=way == "hot copy") as cluster,
    ):
        victim = [node.node_id for node in planned_nodes(bench.bundle.index.plan)][-1]
        prompts = bench.prompts(context, CLIENTS)
        if context not in bench.calm:
            bench.calm[context] = _calm(bench, cluster, prompts, context)
        for round_number in range(bench.rounds):
            cluster.restore()
            readers = start_readers(cluster, f"round{round_number}", prompts, bench.max_tokens(context))
            failed_s = time.perf_counter()
            cluster.signal(victim, number)
            if way == "begin again":
                readers, new = again(cluster, readers, failed_s)
            else:
                new = pauses_of(readers, failed_s)
            pauses += new
            differing += _differing(readers, bench.calm[context], failed_s)
    return _row(f"{number.name} of a stage", way, context, pauses), differing


def _calm(bench: Bench, cluster: ProcessCluster, prompts: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    cluster.restore()
    readers = start_readers(cluster, "calm", prompts, bench.max_tokens(context))
    wait_until(readers, lambda reader: len(reader.token_ids) >= CALM_TOKENS)
    end_readers(readers)
    return [reader.token_ids for reader in readers]


def _differing(readers: Sequence[Reader], calm: Sequence[Sequence[int]], failed_s: float) -> int:
    """Whose tokens, as far as both went, are not those of the calm run.

    Raises ValueError where the calm run ends before the failure: then nothing would be compared.
    """
    for reader, tokens in zip(readers, calm, strict=True):
        if len(tokens) <= len(reader.token_ids) - reader.since(failed_s):
            raise ValueError(
                f"the calm run of {reader.name} has only {len(tokens)} tokens, fewer than before the failure"
            )
    pairs = ((reader.token_ids, tokens) for reader, tokens in zip(readers, calm, strict=True))
    return sum(any(one != other for one, other in zip(*pair, strict=False)) for pair in pairs)


def _orchestrator_failures(bench: Bench) -> tuple[Row, int]:
    """Pauses from the restart of the orchestrator on, up to the end of every answer; and how many answers changed."""
    pauses: list[Pause] = []
    differing, context = 0, 128
    with (
        tempfile.TemporaryDirectory() as folder,
        bench.cluster(folder, context, ORCHESTRATOR_CLIENTS, copies=True) as cluster,
    ):
        prompts = bench.prompts(context, ORCHESTRATOR_CLIENTS)
        cluster.restore()
        calm = start_readers(cluster, "calm", prompts, ORCHESTRATOR_TOKENS)
        wait_until_finished(calm)
        for round_number in range(bench.rounds):
            readers = start_readers(cluster, f"round{round_number}", prompts, ORCHESTRATOR_TOKENS)
            cluster.signal(ORCHESTRATOR, signal.SIGKILL)
            cluster.processes[ORCHESTRATOR].wait()
            restarted_s = time.perf_counter()
            cluster.start(ORCHESTRATOR)
            wait_until_finished(readers)
            pauses += [reader.pause(restarted_s) for reader in readers]
            differing += sum(one.token_ids != other.token_ids for one, other in zip(readers, calm, strict=True))
    return _row("SIGKILL of the orchestrator", "journal", context, pauses), differing


def _steady(bench: Bench, context: int) -> list[Row]:
    """Tokens per second of all clients while nothing fails, with copies and without.

    Two clusters take turns, every other round in the other order: a machine's speed drifts by more than copies cost.
    """
    runs: dict[bool, list[_Steady]] = {True: [], False: []}
    with contextlib.ExitStack() as stack:
        clusters = {}
        for copies in runs:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            clusters[copies] = stack.enter_context(bench.cluster(folder, context, CLIENTS, copies=copies))
            clusters[copies].restore()
        for number in range(bench.rounds):
            for copies in sorted(runs, reverse=number % 2 == 0):
                ports = bench.metrics_ports(copies=copies)
                runs[copies].append(_steady_run(bench, clusters[copies], f"round{number}", context, ports))
    return [
        Row(
            event="none",
            way="hot copy" if copies else "no copies",
            context=context,
            requests=CLIENTS * bench.rounds,
            tokens_per_s=statistics.median(run.tokens_per_s for run in runs[copies]),
            copied_bytes_per_token=statistics.median(run.copied_bytes_per_token for run in runs[copies]),
            of_no_copies=statistics.median(
                run.tokens_per_s / other.tokens_per_s for run, other in zip(runs[copies], runs[False], strict=True)
            ),
        )
        for copies in runs
    ]


def _steady_run(bench: Bench, cluster: ProcessCluster, name: str, context: int, ports: Sequence[int]) -> _Steady:
    readers = start_readers(cluster, name, bench.prompts(context, CLIENTS), bench.max_tokens(context))
    start_s, bytes_before = time.perf_counter(), _copied_bytes(ports)
    wait_until(readers, lambda reader: reader.since(start_s) >= STEADY_TOKENS)
    seconds = time.perf_counter() - start_s
    tokens = sum(reader.since(start_s) for reader in readers)
    copied = _copied_bytes(ports) - bytes_before
    end_readers(readers)
    return _Steady(tokens_per_s=tokens / seconds, copied_bytes_per_token=copied / tokens)


def _copied_bytes(ports: Sequence[int]) -> float:
    """What the nodes with these ports have sent as copies so far, by their metrics."""
    total = 0.0
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
            for line in page.read().decode().splitlines():
                if line.startswith('edgellm_kv_copied_bytes{way="sent"}'):
                    total += float(line.split()[-1])
    return total


def _row(event: str, way: str, context: int, pauses: Sequence[Pause]) -> Row:
    medians = {one.name: statistics.median(getattr(p, one.name) for p in pauses) for one in fields(Pause)}
    ranked = sorted(pause.pause_ms for pause in pauses)
    p99 = ranked[min(len(ranked) - 1, round(0.99 * len(ranked)))]
    return Row(event=event, way=way, context=context, requests=len(pauses), pause_p99_ms=p99, **medians)


def _targets(rows: Sequence[Row], differing: int) -> list[Target]:
    killed = {(row.way, row.context): row for row in rows if row.event == "SIGKILL of a stage"}
    by_event = {(row.event, row.way): row for row in rows}
    short, long = min(context for _, context in killed), max(context for _, context in killed)
    first = killed["hot copy", short]
    sooner = killed["token replay", long].pause_ms / killed["hot copy", long].pause_ms
    stopped = by_event["SIGSTOP of a stage", "hot copy"].pause_p99_ms
    restarted = by_event["SIGKILL of the orchestrator", "journal"].pause_p99_ms
    slower = 1 - by_event["none", "hot copy"].of_no_copies
    return [
        _at_most("answers that differ from a calm run", differing, 0),
        _at_most(f"pause after SIGKILL of a stage, {short} tokens, ms", first.pause_ms, 300),
        _at_most(f"the same, 99th percentile, {short} tokens, ms", first.pause_p99_ms, 700),
        Target(name=f"times sooner than reading {long} tokens again", value=sooner, target=5, met=sooner >= 5),
        _at_most("last pause after SIGSTOP of a stage, ms", stopped, 1200),
        _at_most("share of tokens per second that hot copies cost", slower, 0.05),
        _at_most("last pause after the orchestrator's restart, ms", restarted, 3000),
    ]


def _at_most(name: str, value: float, target: float) -> Target:
    return Target(name=name, value=value, target=target, met=value <= target)
