"""Ours against each peer in turn: both loaded, every run of ours beside one of the peer and a reading of the memory."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import busy
from bench.machine_limits import MachineLimits
from bench.pairs import DECODE_32, MAX_STEPS, Pairing, Phase, Round, Scenario, clean, steps_per_run
from bench.peers.contenders import DRIVERS, OURS, Contender, model_path
from bench.peers.environments import Environments, UnavailableError
from bench.peers.models import Model, ModelStore
from bench.peers.process import DriverProcess, started
from bench.real_time import real_time
from edgellm.engines.cpu.compiler import WEIGHTS_FILE

MAX_BATCH: Final = DECODE_32.batch
KV_TOKENS: Final = MAX_BATCH * (DECODE_32.context + 2 * MAX_STEPS)
"""Room in every engine's KV cache."""
OURS_BY_PHASE: Final[Mapping[Phase, Contender]] = {"decode": OURS["int4"], "prefill": OURS["half"]}
_PAUSE_S: Final = 0.05
"""Before each run, so that threads of the run before stop waiting actively."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to measure."""

    threads: int
    rounds: int
    real_time: bool
    even_if_busy: bool


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A side that is ready to run."""

    contender: Contender
    process: DriverProcess
    load_s: float
    scheduler: str
    weight_bytes: int
    """Of all its files."""

    def run(self, scenario: Scenario, steps: int) -> float:
        """Seconds of one run."""
        if scenario.phase == "prefill":
            return float(self.process.ask(do="prefill", tokens=scenario.context)["seconds"])
        reply = self.process.ask(do="decode", batch=scenario.batch, context=scenario.context, steps=steps)
        return float(reply["seconds"])


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One scenario of one model against one peer; without a pairing, `reason` says why there is none."""

    model: Model
    scenario: Scenario
    peer: Contender
    pairing: Pairing | None
    reason: str
    scheduler: str
    """Of both sides, as permitted."""
    ours_name: str
    ours_weight_bytes: int
    ours_load_s: float
    ours_rss_mib: float
    peer_load_s: float
    peer_rss_mib: float


class Comparison:
    """Compares on one model after the other."""

    def __init__(
        self,
        settings: Settings,
        environments: Environments,
        store: ModelStore,
        limits: MachineLimits,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._store = store
        self._environments = environments
        self._limits = limits
        self._say = say

    def run(self, model: Model, peers: Sequence[Contender], scenarios: Sequence[Scenario]) -> Iterator[Compared | str]:
        """Results as they come, and a sentence for each peer that cannot run here."""
        with contextlib.ExitStack() as stack:
            phases: set[Phase] = {scenario.phase for scenario in scenarios}
            ours = {phase: stack.enter_context(self.loaded(OURS_BY_PHASE[phase], model)) for phase in phases}
            for peer in peers:
                wanted = [scenario for scenario in scenarios if scenario.phase in peer.phases]
                if not wanted:
                    continue
                try:
                    with self.loaded(peer, model) as other:
                        for scenario in wanted:
                            yield self._compare(model, scenario, ours[scenario.phase], other)
                except UnavailableError as error:
                    yield f"{peer.name} on {model.name}: {error}"

    @contextlib.contextmanager
    def loaded(self, contender: Contender, model: Model) -> Iterator[Loaded]:
        """A running driver with its model. Raises UnavailableError."""
        environment = self._environments.prepare(contender.environment)
        path = model_path(self._store, contender, model, environment)
        self._say(f"{contender.name} on {model.name}: loading")
        with started(environment, DRIVERS / contender.driver) as process:
            reply = process.ask(
                do="load",
                model=str(path),
                threads=self._settings.threads,
                max_batch=MAX_BATCH,
                kv_tokens=KV_TOKENS,
                vocab_size=model.vocab_size,
                real_time=self._settings.real_time,
            )
            yield Loaded(
                contender=contender,
                process=process,
                load_s=reply["load_s"],
                scheduler=reply["scheduler"],
                weight_bytes=_weight_bytes(path),
            )

    def _compare(self, model: Model, scenario: Scenario, ours: Loaded, peer: Loaded) -> Compared:
        self._say(f"{peer.contender.name} on {model.name}: {scenario.name}")
        steps = _warm_up(scenario, ours, peer)
        pairing, reason = self._pairing(scenario, steps, ours, peer)
        return Compared(
            model=model,
            scenario=scenario,
            peer=peer.contender,
            pairing=pairing,
            reason=reason,
            scheduler=ours.scheduler,
            ours_name=ours.contender.name,
            ours_weight_bytes=ours.weight_bytes,
            ours_load_s=ours.load_s,
            ours_rss_mib=ours.process.rss_mib(),
            peer_load_s=peer.load_s,
            peer_rss_mib=peer.process.rss_mib(),
        )

    def _pairing(self, scenario: Scenario, steps: int, ours: Loaded, peer: Loaded) -> tuple[Pairing | None, str]:
        """Rounds until enough of them were undisturbed, at most twice as many as wanted."""
        wanted, rounds = self._settings.rounds, list[Round]()
        for number in range(2 * wanted):
            rounds.append(self._round(scenario, steps, ours, peer, ours_first=number % 2 == 0))
            kept = tuple(rounds) if self._settings.even_if_busy else clean(rounds)
            if len(kept) == wanted:
                return Pairing(scenario=scenario, steps=steps, rounds=kept), ""
        others = max(r.shares.others + r.shares.stolen for r in rounds)
        return None, f"others used up to {others:.0%} of the processors"

    def _round(self, scenario: Scenario, steps: int, ours: Loaded, peer: Loaded, *, ours_first: bool) -> Round:
        pids = [ours.process.pid, peer.process.pid]
        before = busy.read_times(pids)
        time.sleep(_PAUSE_S)
        with real_time(wanted=self._settings.real_time):
            reads = [self._limits.read_gb_per_s(threads) for threads in (1, self._settings.threads)]
        seconds = {}
        for side in (ours, peer) if ours_first else (peer, ours):
            time.sleep(_PAUSE_S)
            seconds[side.process.pid] = side.run(scenario, steps)
        return Round(
            ours_s=seconds[ours.process.pid],
            peer_s=seconds[peer.process.pid],
            read_1_gb_per_s=reads[0],
            read_2_gb_per_s=reads[1],
            shares=busy.shares(before, busy.read_times(pids), busy.core_count()),
        )


def _warm_up(scenario: Scenario, *sides: Loaded) -> int:
    """One run of each that does not count; the steps that runs will have."""
    if scenario.phase == "prefill":
        for side in sides:
            side.run(scenario, 1)
        return 1
    few = 2
    for side in sides:
        side.run(scenario, few)
    return steps_per_run(max(side.run(scenario, few) for side in sides) / few)


def _weight_bytes(path: Path) -> int:
    """Of our engine's packed weights; for peers, all files."""
    if path.is_file():
        return path.stat().st_size
    packed = path / WEIGHTS_FILE
    files = [packed] if packed.exists() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
