"""From paired runs to what is printed: a row per engine and scenario, the targets, and where ours is behind."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from bench.comparison import Compared
from bench.loading import KV_TOKENS
from bench.pairs import DECODE_1, DECODE_8, DECODE_32, Pairing, Scenario, bytes_per_step, memory_is_fast
from bench.peers.models import Model
from bench.report import Target

LARGE: Final = "1.1b"
BANDWIDTH_TARGET: Final = 0.8
PEAK_TARGET: Final = 0.78
PREFILL_RATIO_TARGET: Final = 1.1
FAST_MEMORY_RATIO_TARGET: Final = 2.0
SLOW_MEMORY_RATIO_TARGET: Final = 1.4
RATIO_TARGETS: Final[Mapping[tuple[bool, Scenario], float]] = {
    (True, DECODE_8): 2.5,
    (True, DECODE_32): 2.0,
    (False, DECODE_1): 2.0,
    (False, DECODE_8): 2.0,
    (False, DECODE_32): 1.5,
}
"""Over the best peer, by whether the model is the large one; batch 1 of that depends on the memory."""
EXTRA_RSS_TARGET_MIB: Final = 80.0
LOAD_TARGET_S: Final = 0.3


@dataclass(frozen=True, kw_only=True)
class OursRow:
    """Ours in one scenario, over the rounds against all peers."""

    model: str
    scenario: str
    engine: str
    tokens_per_s: float
    ours_times: float = 1.0
    of_limit: float
    """Decoding: of the bandwidth measured beside it. Prefill: of the bf16 peak, with all of the step's time counted."""
    read_gb_per_s: float
    """Median of the faster of one thread and all threads."""
    memory: str
    """`fast` where a second thread helps."""
    bf16_gflop_per_s: float
    """Peak of the machine, measured in the same run."""
    rss_mib: float
    load_s: float
    others: float
    """Share of the processors that others used."""
    measured_at: str
    """UTC; from the first to the last of its rounds."""


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """A peer beside ours; `ours_times`: how many times faster ours was in the same rounds."""

    model: str
    scenario: str
    engine: str
    tokens_per_s: float
    ours_times: float
    of_limit: None = None
    read_gb_per_s: float
    memory: str
    bf16_gflop_per_s: float
    rss_mib: float
    load_s: float
    others: float
    measured_at: str


def ours_rows(compared: Sequence[Compared]) -> list[OursRow]:
    """One per model and scenario that has any pairing."""
    return [_ours_row(group) for group in _by_scenario(compared)]


def peer_rows(compared: Iterable[Compared]) -> list[PeerRow]:
    """One per pairing."""
    return [_peer_row(result, result.pairing) for result in compared if result.pairing is not None]


def targets(ours: Sequence[OursRow], compared: Sequence[Compared]) -> list[Target]:
    """What was promised, for the models and scenarios that were measured."""
    groups = _by_scenario(compared)
    return [
        *(target for group in groups for target in _ratio_targets(group)),
        *(target for row in ours if row.model == LARGE for target in _limit_targets(row)),
        *_memory_targets(groups),
    ]


def behind(compared: Iterable[Compared]) -> list[str]:
    """A sentence for each pairing that ours lost, and for each that did not come about."""
    return [sentence for result in compared if (sentence := _sentence(result)) is not None]


def _sentence(result: Compared) -> str | None:
    what = f"{result.peer.name} on {result.model.name}, {result.scenario.name}"
    if result.pairing is None:
        return f"not compared: {what}: {result.reason}"
    return f"behind: {what}: {result.pairing.ratio:.2f} times its speed" if result.pairing.ratio < 1 else None


def _by_scenario(compared: Sequence[Compared]) -> list[list[Compared]]:
    def key(result: Compared) -> tuple[str, str]:
        return result.model.name, result.scenario.name

    paired = sorted((result for result in compared if result.pairing is not None), key=key)
    return [list(group) for _, group in groupby(paired, key)]


def _ours_row(group: Sequence[Compared]) -> OursRow:
    first, pairings = group[0], list(_pairings(group))
    times = sorted({result.measured_at for result in group})
    rounds = [r for pairing in pairings for r in pairing.rounds]
    return OursRow(
        model=first.model.name,
        scenario=first.scenario.name,
        engine=first.ours_name,
        tokens_per_s=statistics.median(pairing.ours_tokens_per_s for pairing in pairings),
        of_limit=statistics.median(_of_limit(*pair) for pair in zip(group, pairings, strict=True)),
        read_gb_per_s=statistics.median(r.read_gb_per_s for r in rounds),
        memory="fast" if memory_is_fast(rounds) else "slow",
        bf16_gflop_per_s=statistics.median(result.peaks.bf16 for result in group),
        rss_mib=max(result.ours_rss_mib for result in group),
        load_s=max(result.ours_load_s for result in group),
        others=max(pairing.others_share for pairing in pairings),
        measured_at=" to ".join(dict.fromkeys((times[0], times[-1]))),
    )


def _peer_row(result: Compared, pairing: Pairing) -> PeerRow:
    return PeerRow(
        model=result.model.name,
        scenario=result.scenario.name,
        engine=result.peer.name,
        tokens_per_s=pairing.peer_tokens_per_s,
        ours_times=pairing.ratio,
        read_gb_per_s=pairing.read_gb_per_s,
        memory="fast" if memory_is_fast(pairing.rounds) else "slow",
        bf16_gflop_per_s=result.peaks.bf16,
        rss_mib=result.peer_rss_mib,
        load_s=result.peer_load_s,
        others=pairing.others_share,
        measured_at=result.measured_at,
    )


def _of_limit(result: Compared, pairing: Pairing) -> float:
    if result.scenario.phase == "prefill":
        flops_per_s = 2 * result.model.linear_parameters * pairing.ours_tokens_per_s
        return flops_per_s / 1e9 / result.peaks.bf16 if result.peaks.bf16 else 0.0
    read = result.ours_weight_bytes - embedding_bytes(result.model)
    return pairing.of_bandwidth(bytes_per_step(result.scenario, read, result.model.kv_bytes_per_token, pairing.steps))


def embedding_bytes(model: Model) -> int:
    """Of the int8 table that a decoding step reads single rows of: none where the head reads the same table."""
    return 0 if model.tied_embeddings else model.vocab_size * model.hidden_size


def _ratio_targets(group: Sequence[Compared]) -> Iterator[Target]:
    """Over the best peer: the one that ours is least ahead of."""
    model, scenario = group[0].model, group[0].scenario
    wanted = _ratio_target(model, scenario, list(_pairings(group)))
    ratio, peer = min((p.ratio, result.peer.name) for result, p in zip(group, _pairings(group), strict=True))
    yield Target(name=f"{model.name}, {scenario.name}, times {peer}", value=ratio, target=wanted, met=ratio >= wanted)


def _ratio_target(model: Model, scenario: Scenario, pairings: Sequence[Pairing]) -> float:
    if scenario.phase == "prefill":
        return PREFILL_RATIO_TARGET
    if model.name == LARGE and scenario == DECODE_1:
        is_fast = memory_is_fast([r for pairing in pairings for r in pairing.rounds])
        return FAST_MEMORY_RATIO_TARGET if is_fast else SLOW_MEMORY_RATIO_TARGET
    return RATIO_TARGETS[model.name == LARGE, scenario]


def _limit_targets(row: OursRow) -> Iterator[Target]:
    if row.scenario == DECODE_1.name:
        name, wanted = f"{row.model}, {row.scenario}, of the bandwidth", BANDWIDTH_TARGET
        yield Target(name=name, value=row.of_limit, target=wanted, met=row.of_limit >= wanted)
    if row.scenario.startswith("prefill"):
        name, wanted = f"{row.model}, {row.scenario}, of the bf16 peak (whole step)", PEAK_TARGET
        yield Target(name=name, value=row.of_limit, target=wanted, met=row.of_limit >= wanted)


def _memory_targets(groups: Sequence[Sequence[Compared]]) -> Iterator[Target]:
    """Of the INT4 engine after its last scenario of each model, and of the large one's loading."""
    decoding = {group[0].model.name: group[-1] for group in groups if group[0].scenario.phase == "decode"}
    for name, result in decoding.items():
        extra = extra_rss_mib(result)
        what = f"{name}, RSS above packed weights and KV pool, MiB at most"
        yield Target(name=what, value=extra, target=EXTRA_RSS_TARGET_MIB, met=extra <= EXTRA_RSS_TARGET_MIB)
        if name == LARGE:
            seconds, what = result.ours_load_s, f"{name}, seconds to load at most"
            yield Target(name=what, value=seconds, target=LOAD_TARGET_S, met=seconds <= LOAD_TARGET_S)


def extra_rss_mib(result: Compared) -> float:
    """Resident memory of our driver, Python and NumPy included, above its weights and its whole KV pool."""
    needed = result.ours_weight_bytes + KV_TOKENS * result.model.kv_bytes_per_token
    return result.ours_rss_mib - needed / 2**20


def _pairings(group: Iterable[Compared]) -> Iterator[Pairing]:
    return (result.pairing for result in group if result.pairing is not None)
