"""Ours against each peer in turn: both loaded, every run of ours beside one of the peer and a reading of the memory."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from bench.installed_code import Conditions, PeerCode, kernels_sha256, peer_code
from bench.loading import Loaded, Loader
from bench.machine_limits import Peaks
from bench.pairs import Pairing, Phase, Scenario
from bench.peers.contenders import OURS, Contender
from bench.peers.environments import UnavailableError
from bench.peers.models import Model
from bench.real_time import real_time
from bench.turns import Turns, side, warm_up

OURS_BY_PHASE: Final[Mapping[Phase, Contender]] = {"decode": OURS["int4"], "prefill": OURS["half"]}


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
    peaks: Peaks
    """Of the machine, just before this peer's runs."""
    measured_at: str
    """UTC, to the minute."""
    conditions: Conditions
    kernels_sha256: str
    peer_code: PeerCode | None = None
    """None in a result from before this was kept."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares on one model after the other."""

    loader: Loader
    turns: Turns
    conditions: Conditions

    def run(self, model: Model, wanted: Sequence[tuple[Contender, Sequence[Scenario]]]) -> Iterator[Compared | str]:
        """wanted: scenarios of each peer. Results as they come, and a sentence for each peer that cannot run here."""
        with contextlib.ExitStack() as stack:
            phases: set[Phase] = {scenario.phase for _, scenarios in wanted for scenario in scenarios}
            ours = {phase: stack.enter_context(self.loader.loaded(OURS_BY_PHASE[phase], model)) for phase in phases}
            for peer, scenarios in wanted:
                try:
                    with self.loader.loaded(peer, model) as other:
                        peaks = self._peaks()
                        for scenario in scenarios:
                            yield self._compare(model, scenario, ours[scenario.phase], other, peaks)
                except UnavailableError as error:
                    yield f"{peer.name} on {model.name}: {error}"

    def _peaks(self) -> Peaks:
        with real_time(wanted=self.turns.real_time):
            return self.turns.limits.peaks()

    def _compare(self, model: Model, scenario: Scenario, ours: Loaded, peer: Loaded, peaks: Peaks) -> Compared:
        self.loader.say(f"{peer.contender.name} on {model.name}: {scenario.name}")
        steps = warm_up(scenario, ours, peer)
        rounds, reason = self.turns.take(side(ours, scenario, steps), side(peer, scenario, steps))
        return Compared(
            model=model,
            scenario=scenario,
            peer=peer.contender,
            pairing=Pairing(scenario=scenario, steps=steps, rounds=rounds) if rounds else None,
            reason=reason,
            scheduler=ours.scheduler,
            ours_name=ours.contender.name,
            ours_weight_bytes=ours.weight_bytes,
            ours_load_s=ours.load_s,
            ours_rss_mib=ours.process.rss_mib(),
            peer_load_s=peer.load_s,
            peer_rss_mib=peer.process.rss_mib(),
            peaks=peaks,
            measured_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
            conditions=self.conditions,
            kernels_sha256=kernels_sha256(),
            peer_code=peer_code(peer.contender),
        )
