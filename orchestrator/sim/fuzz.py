"""One random cluster, workload and set of faults per seed; the invariants decide."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.sim.clients import Ask
from edgellm.orchestrator.sim.device import DeviceModel
from edgellm.orchestrator.sim.faults import Fault, draw_faults, schedule_fault
from edgellm.orchestrator.sim.machines import NodePlan, toy_bundle
from edgellm.orchestrator.sim.network import LinkModel
from edgellm.orchestrator.sim.story import Story
from edgellm.orchestrator.sim.toy import VOCAB
from edgellm.orchestrator.sim.world import World, simulated_world

ARRIVALS_S = 0.8
FAULTS_S = 1.5
"""Requests arrive, and faults begin, until then."""
LONGEST_S = 60.0
"""By then everything must have ended: faults are over after 4 s, and no single wait is longer than 10 s."""
LINK = LinkModel(latency_s=0.001, bytes_per_s=2e6)
STORY_LINES = 60
_PREFILL = DeviceModel(read_token_s=0.0005, step_s=0.02, row_s=0.001)
_DECODE = replace(_PREFILL, read_token_s=0.001)
_PREFILL_NODE = NodePlan(name="", engine="prefill-tp0of1", device=_PREFILL, kv_blocks=0)
_DECODE_NODE = NodePlan(name="", engine="", device=_DECODE, kv_blocks=0)
_BOUNDS = {
    "hot_copies": True,
    "dead_after_s": 1.0,
    "release_timeout_s": 5.0,
    "attempt_timeout_s": 5.0,
    "link_pause_s": 1.0,
    "placement_timeout_s": 50.0,
    "max_attempts": 1000,
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything a run depends on."""

    seed: int
    stages: int
    journal: bool
    """Only with a journal does the orchestrator crash."""
    nodes: tuple[NodePlan, ...]
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]


class ScenarioError(ValueError):
    """A scenario file cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A scenario that broke an invariant."""

    scenario: Scenario
    error: str


def draw_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    stages = rng.choice((1, 1, 2, 3))
    nodes = _draw_nodes(rng, stages)
    asks = tuple(_draw_ask(rng, number) for number in range(rng.randint(2, 6)))
    journal = rng.random() < 0.3
    names = [node.name for node in nodes]
    faults = draw_faults(rng, names, FAULTS_S, most=6, of_orchestrator=0.3 if journal else 0.0)
    return Scenario(seed=seed, stages=stages, journal=journal, nodes=nodes, asks=asks, faults=tuple(faults))


def _draw_nodes(rng: random.Random, stages: int) -> tuple[NodePlan, ...]:
    """Prefill nodes, one or two pipelines, and spares."""
    half, kv_blocks = rng.random() < 0.7, rng.choice((12, 24, 64))
    prefill = [_PREFILL_NODE] * rng.randint(1, 2)
    decode = [replace(_DECODE_NODE, engine=f"decode-pp{stage}of{stages}", half=half) for stage in range(stages)]
    decode *= rng.randint(1, 3) if stages == 1 else rng.choice((1, 1, 2))
    spares = [replace(decode[0], spare=True)] * rng.choice((0, 0, 1, 2))
    groups = (("p", prefill), ("d", decode), ("s", spares))
    return tuple(
        replace(plan, name=f"{letter}{number}", kv_blocks=kv_blocks)
        for letter, plans in groups
        for number, plan in enumerate(plans)
    )


def _draw_ask(rng: random.Random, number: int) -> Ask:
    at_s = rng.uniform(0.1, ARRIVALS_S)
    return Ask(
        name=f"r{number}",
        at_s=at_s,
        prompt_tokens=rng.randint(1, rng.choice((40, 200))),
        max_tokens=rng.randint(1, rng.choice((8, 50))),
        temperature=rng.choice((0.0, 1.0)),
        stop_token_ids=(rng.randrange(VOCAB),) if rng.random() < 0.3 else (),
        deadline_s=rng.uniform(0.1, 3.0) if rng.random() < 0.2 else None,
        allow_degraded=rng.random() < 0.3,
        cancel_s=at_s + rng.expovariate(5) if rng.random() < 0.15 else None,
    )


def read_scenario(path: Path) -> Scenario:
    """Raises ScenarioError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Scenario)
    except (OSError, msgspec.DecodeError) as error:
        raise ScenarioError(f"cannot read the scenario {path}: {error}") from error


@cache
def _bundle(num_stages: int) -> tuple[ServedBundle, TemporaryDirectory[str]]:
    """Kept for as long as this process lives."""
    folder = TemporaryDirectory()
    return toy_bundle(Path(folder.name), num_layers=max(2, num_stages), num_stages=num_stages), folder


def run_scenario(scenario: Scenario, policy: Callable[[], Policy], story: Story) -> Failure | None:
    """Run to the end, or to the first broken invariant."""
    bundle, _ = _bundle(scenario.stages)
    with (
        TemporaryDirectory() as folder,
        simulated_world(bundle, policy, _BOUNDS, seed=scenario.seed, link=LINK, story=story) as world,
    ):
        world.orchestrator.journal_folder = Path(folder) if scenario.journal else None
        try:
            _fill(world, scenario)
            world.run(LONGEST_S)
        except (AssertionError, ValueError, KeyError) as error:
            return Failure(scenario=scenario, error=f"{type(error).__name__}: {error}")
    return None


def _fill(world: World, scenario: Scenario) -> None:
    for plan in scenario.nodes:
        world.add_node(plan)
    for ask in scenario.asks:
        world.add_client(ask)
    for fault in scenario.faults:
        schedule_fault(world, fault)


def shrink(failure: Failure, policy: Callable[[], Policy]) -> Failure:
    """Drop faults and requests as long as the scenario still fails."""
    smallest = failure
    for field in ("faults", "asks"):
        index = 0
        while index < len(kept := getattr(smallest.scenario, field)):
            fewer = replace(smallest.scenario, **{field: kept[:index] + kept[index + 1 :]})
            again = run_scenario(fewer, policy, Story(wanted=False))
            if again is None:
                index += 1
            else:
                smallest = again
    return smallest


def tell(failure: Failure, policy: Callable[[], Policy]) -> str:
    """The failure's seed, what went wrong, the end of its story, and the scenario for `read_scenario`."""
    scenario, story = failure.scenario, Story(wanted=True)
    run_scenario(scenario, policy, story)
    return "\n".join(
        [
            f"seed {scenario.seed}: {failure.error}",
            "nodes: "
            + ", ".join(
                f"{node.name} {node.engine} {node.kv_blocks} blocks{' spare' * node.spare}" for node in scenario.nodes
            ),
            f"{len(scenario.asks)} requests, {len(scenario.faults)} faults",
            *story.lines[-STORY_LINES:],
            msgspec.json.encode(scenario).decode(),
        ]
    )
