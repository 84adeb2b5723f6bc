"""What a failure costs running requests: pauses with hot copies, with token replay, and after beginning again.

Real processes on one machine: an orchestrator, and a node for each engine of the bundle's plan and one spare. Clients
ask for long answers; when all of them are in the middle, the node of the last decode stage is killed (or stopped), and
each client's pause is the time until its next token. The same prompts, cluster and kill for

* hot copy: ours; the spare takes over from its copy;
* token replay: without copies the prompt is read again and the known tokens are replayed (as NVIDIA Dynamo does);
* begin again: clients ask anew and wait for the token after the last one they had (as with vLLM, SGLang, llama.cpp).

Where nothing fails: what copies cost in tokens per second, their bytes, and how far they lag.
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Final

from bench import failover_chart
from bench.clusters import BundleCluster, random_prompts, write_by_turns
from bench.failover_report import KILLED, RESTARTED, Row, row_of_pauses, steady_row, targets
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
from bench.report import Report, machine
from edgellm.orchestrator.bundle import ServedBundle, open_bundle
from edgellm.orchestrator.process_cluster import ORCHESTRATOR, ProcessCluster

CLIENTS: Final = 8
ORCHESTRATOR_CLIENTS: Final = 16
ORCHESTRATOR_TOKENS: Final = 128
"""Of each answer that goes on over a restart of the orchestrator."""
EVENTS: Final = ("kill", "stop", "restart", "none")
"""A decode stage killed, one stopped, the orchestrator killed and started again, nothing."""
WAYS: Final = ("hot copy", "token replay", "begin again")
MIN_ANSWER_TOKENS: Final = 1024
"""Room that a bundle must leave after a prompt."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One bundle, served again and again."""

    bundle: ServedBundle
    rounds: int
    calm: dict[int, list[list[int]]] = field(default_factory=dict)
    """For each context, what the clients read when nothing fails."""

    def served(self, *, copies: bool) -> BundleCluster:
        """A cluster with copies and one without may run at once."""
        return BundleCluster(bundle=self.bundle, number=0 if copies else 1, spares=1, copies=copies)

    def cluster(self, folder: str, context: int, clients: int, *, copies: bool) -> ProcessCluster:
        tokens = context + self.max_tokens(context)
        return self.served(copies=copies).processes(folder, clients=clients, tokens=tokens)

    def max_tokens(self, context: int) -> int:
        """Enough that nobody is done while others still wait for their first token."""
        return min(max(1024, context // 2), self.bundle.index.model.max_seq_len - context)

    def calm_tokens(self, context: int) -> int:
        """That every client reads when nothing fails: more than any has when something does."""
        return self.max_tokens(context) // 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, default=Path(".demo/smollm2-135m"), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (%(default)s)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", help="prompt tokens (default: 1024 and the longest up to 4096)"
    )
    parser.add_argument("--events", nargs="+", choices=EVENTS, default=list(EVENTS), help="default: all")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to go on after a kill; default: all"
    )
    parser.add_argument("--chart", type=Path, help="write a chart of the pauses after kills here; needs matplotlib")


def run(options: argparse.Namespace) -> Report:
    """Raises ClusterStartError, and ValueError if a request fails: then there is nothing to report.

    ValueError before anything is measured if the bundle is too small, or there can be no chart.
    """
    if options.chart is not None:
        failover_chart.require_matplotlib()
    bench = Bench(bundle=open_bundle(options.bundle), rounds=options.rounds)
    contexts = choose_contexts(bench.bundle, options.contexts)
    found = [part for event in options.events for part in _event(bench, event, contexts, options.ways)]
    rows = [row for row, _ in found]
    if options.chart is not None:
        failover_chart.draw(
            [(row.way, row.context, row.pause_ms) for row in rows if row.event == KILLED], options.chart
        )
    return Report(
        name="failover",
        machine=machine() | {"rounds": options.rounds},
        results=[{one.name: getattr(row, one.name) for one in fields(Row)} for row in rows],
        targets=targets(rows, sum(changed for _, changed in found)),
    )


def choose_contexts(bundle: ServedBundle, wanted: Sequence[int] | None) -> list[int]:
    """As wanted, or a short and a long one. ValueError if answers would end before anything fails."""
    longest = bundle.index.model.max_seq_len - MIN_ANSWER_TOKENS
    if longest < 1:
        raise ValueError(
            f"{bundle.folder} has room for {bundle.index.model.max_seq_len} tokens, and an answer alone needs "
            f"{MIN_ANSWER_TOKENS}; build it with --max-seq-len {2 * MIN_ANSWER_TOKENS}, of a model that reads so many"
        )
    contexts = sorted(wanted or {min(1024, longest), min(4096, longest)})
    if contexts[0] < 1:
        raise ValueError(f"--contexts {contexts[0]}: a prompt has at least one token")
    if contexts[-1] > longest:
        raise ValueError(
            f"--contexts {contexts[-1]}: {bundle.folder} has room for at most {longest} prompt tokens and an answer; "
            "build it with a larger --max-seq-len"
        )
    return contexts


def _event(bench: Bench, event: str, contexts: Sequence[int], ways: Sequence[str]) -> list[tuple[Row, int]]:
    """Rows, each with how many clients got other tokens than in a calm run."""
    match event:
        case "kill":
            return [_failures(bench, context, way, signal.SIGKILL) for context in contexts for way in ways]
        case "stop":
            return [_failures(bench, contexts[0], "hot copy", signal.SIGSTOP)]
        case "restart":
            return [_orchestrator_failures(bench)]
        case _:
            return [(row, 0) for row in _steady(bench, contexts[0])]


def _failures(bench: Bench, context: int, way: str, number: signal.Signals) -> tuple[Row, int]:
    """The row, and how many clients got other tokens than in the round before anything failed."""
    pauses: list[Pause] = []
    differing = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        bench.cluster(folder, context, CLIENTS, copies=way == "hot copy") as cluster,
    ):
        victim = [node.node_id for node in bench.served(copies=False).nodes if not node.spare][-1]
        prompts = random_prompts(CLIENTS, context)
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
    return row_of_pauses(f"{number.name} of a stage", way, context, pauses), differing


def _calm(bench: Bench, cluster: ProcessCluster, prompts: Sequence[Sequence[int]], context: int) -> list[list[int]]:
    cluster.restore()
    readers = start_readers(cluster, "calm", prompts, bench.max_tokens(context))
    wait_until(readers, lambda reader: len(reader.token_ids) >= bench.calm_tokens(context))
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
        prompts = random_prompts(ORCHESTRATOR_CLIENTS, context)
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
    return row_of_pauses(RESTARTED, "journal", context, pauses), differing


def _steady(bench: Bench, context: int) -> list[Row]:
    """Tokens per second of all clients while nothing fails, with copies and without."""
    served = [bench.served(copies=True), bench.served(copies=False)]
    prompts, max_tokens = random_prompts(CLIENTS, context), bench.max_tokens(context)
    with_copies, without = write_by_turns(served, prompts, max_tokens, bench.rounds)
    return [
        steady_row("hot copy", context, CLIENTS, with_copies, without),
        steady_row("no copies", context, CLIENTS, without, without),
    ]
