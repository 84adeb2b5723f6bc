"""A bundle's nodes as processes, with room for the requests of a benchmark, and how fast they write together."""

import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Final

from bench import busy, node_metrics
from bench.node_metrics import Page, StepTimes
from bench.recovery import end_readers, start_readers, wait_until
from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.local_nodes import LocalNode, planned_nodes
from edgellm.orchestrator.process_cluster import ProcessCluster

TOKEN_IDS: Final = range(300, 500)
STEADY_TOKENS: Final = 128
"""Of each client, for a reading of throughput."""
SAMPLES: Final = 8
"""Of what nodes say of themselves, in that time."""
FIRST_METRICS_PORT: Final = 19_400
"""Below the ports that the system gives to whoever asks for any."""


@dataclass(frozen=True, kw_only=True)
class BundleCluster:
    """How a bundle is served; each cluster that runs beside another has a number of its own."""

    bundle: ServedBundle
    number: int = 0
    spares: int = 0
    copies: bool = False

    @property
    def nodes(self) -> list[LocalNode]:
        return planned_nodes(self.bundle.index.plan, spares=self.spares)

    @property
    def metrics_ports(self) -> range:
        """One for each node."""
        first = FIRST_METRICS_PORT + 20 * self.number
        return range(first, first + len(self.nodes))

    def processes(self, folder: str, *, clients: int, tokens: int) -> ProcessCluster:
        """Every node could hold all requests of so many tokens at once, and a copy of each."""
        blocks = 2 * clients * (-(-tokens // self.bundle.index.kv.block_tokens) + 1)
        nodes = {}
        for node, port in zip(self.nodes, self.metrics_ports, strict=True):
            options = ["--kv-blocks", str(blocks), "--metrics-port", str(port)]
            options += ["--spare"] if node.spare else []
            nodes[node.node_id] = (node.engine, *options)
        options = () if self.copies else ("--no-hot-copies",)
        return ProcessCluster(self.bundle.folder, Path(folder), nodes, serve_options=options)


@dataclass(frozen=True, kw_only=True)
class Steady:
    """Throughput of all clients while nothing fails, and what their copies cost."""

    tokens_per_s: float
    copied_bytes_per_token: float
    lag_tokens: tuple[float, ...]
    """Of the copy furthest behind, at several moments."""
    others: float
    """Share of the processors that neither these processes nor this one used."""
    step_times: tuple[StepTimes, ...] = ()
    """Of each node, in the cluster's order."""


def random_prompts(count: int, tokens: int) -> list[list[int]]:
    """The same ones each time."""
    chance = random.Random(tokens)
    return [chance.choices(TOKEN_IDS, k=tokens) for _ in range(count)]


def write_by_turns(
    served: Sequence[BundleCluster], prompts: Sequence[Sequence[int]], max_tokens: int, rounds: int
) -> list[list[Steady]]:
    """Runs of each, with all of them up, every other round in the other order: a machine's speed drifts by more than
    what is compared. The first round does not count."""
    runs: list[list[Steady]] = [[] for _ in served]
    tokens = len(prompts[0]) + max_tokens
    with contextlib.ExitStack() as stack:
        clusters = []
        for one in served:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            clusters.append(stack.enter_context(one.processes(folder, clients=len(prompts), tokens=tokens)))
            clusters[-1].restore()
        for number in range(rounds + 1):
            turns = list(zip(served, clusters, runs, strict=True))
            for one, cluster, taken in turns if number % 2 == 0 else reversed(turns):
                taken.append(write_steadily(one, cluster, f"round{number}", prompts, max_tokens))
    return [taken[1:] for taken in runs]


def write_steadily(
    served: BundleCluster, cluster: ProcessCluster, name: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> Steady:
    """From when all clients are in the middle of their answers until each has `STEADY_TOKENS` more."""
    readers = start_readers(cluster, name, prompts, max_tokens)
    pids = busy.family(os.getpid())[1:]
    before, pages_before, start_s = busy.read_times(pids), _pages(served), time.perf_counter()
    lags = []
    for sample in range(1, SAMPLES + 1):
        wait_until(readers, lambda reader, due=sample * STEADY_TOKENS // SAMPLES: reader.since(start_s) >= due)  # type: ignore[misc]
        lags.append(max(page[_LAG] for page in _pages(served)))
    seconds = time.perf_counter() - start_s
    tokens = sum(reader.since(start_s) for reader in readers)
    pages, shares = _pages(served), busy.shares(before, busy.read_times(pids), busy.core_count())
    end_readers(readers)
    copied = sum(page[_COPIED] for page in pages) - sum(page[_COPIED] for page in pages_before)
    return Steady(
        tokens_per_s=tokens / seconds,
        copied_bytes_per_token=copied / tokens,
        lag_tokens=tuple(lags),
        others=shares.others + shares.stolen,
        step_times=tuple(starmap(node_metrics.step_times, zip(pages_before, pages, strict=True))),
    )


def median_tokens_per_s(runs: Sequence[Steady]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def median_ratio(runs: Sequence[Steady], others: Sequence[Steady]) -> float:
    """Of throughputs that were measured by turns: the median over rounds."""
    return statistics.median(run.tokens_per_s / other.tokens_per_s for run, other in zip(runs, others, strict=True))


_COPIED: Final = 'edgellm_kv_copied_bytes{way="sent"}'
_LAG: Final = "edgellm_kv_copy_lag_tokens"


def _pages(served: BundleCluster) -> list[Page]:
    return [node_metrics.read_page(port) for port in served.metrics_ports]
