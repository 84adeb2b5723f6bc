"""One random cluster, workload and set of faults per seed; the invariants decide."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.core.values import Generation, NodeId, NodeProfile, RequestId, RequestSpec, Sampling
from edgellm.orchestrator.sim.cluster import simulated_config, simulated_profile
from edgellm.orchestrator.sim.device import DeviceModel, LinkModel
from edgellm.orchestrator.sim.faults import (
    Cancellation,
    Fault,
    draw_faults,
    schedule_cancellation,
    schedule_fault,
)
from edgellm.orchestrator.sim.toy import VOCAB
from edgellm.orchestrator.sim.world import World

HORIZON_S = 2.0
"""Requests arrive and faults begin in this time."""
LONGEST_S = 60.0
"""By then everything must have ended: faults are over after 5 s, and no single wait is longer than 5 s."""
LINK = LinkModel(latency_s=0.001, bytes_per_s=1e7)
STORY_LINES = 40
_BOUNDS = {
    "dead_after_s": 1.0,
    "release_timeout_s": 5.0,
    "attempt_timeout_s": 5.0,
    "placement_timeout_s": 50.0,
    "max_attempts": 1000,
}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Everything a run depends on."""

    seed: int
    prefill_nodes: int
    decode_nodes: int
    half_engines: bool
    """Whether decode nodes can read prompts in half precision."""
    kv_blocks: int
    requests: tuple[tuple[float, RequestSpec], ...]
    cancellations: tuple[Cancellation, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A seed that broke an invariant."""

    scenario: Scenario
    error: str
    story: tuple[str, ...]


def draw_scenario(seed: int) -> Scenario:
    rng = random.Random(seed)
    prefill_nodes, decode_nodes = rng.randint(1, 2), rng.randint(1, 3)
    requests = tuple(_draw_request(rng, number) for number in range(rng.randint(3, 20)))
    names = [NodeId(f"p{i}") for i in range(prefill_nodes)] + [NodeId(f"d{i}") for i in range(decode_nodes)]
    cancelled = rng.sample(requests, rng.randint(0, len(requests) // 3))
    return Scenario(
        seed=seed,
        prefill_nodes=prefill_nodes,
        decode_nodes=decode_nodes,
        half_engines=rng.random() < 0.7,
        kv_blocks=rng.choice((12, 24, 64)),
        requests=requests,
        cancellations=tuple(
            Cancellation(request_id=spec.request_id, at_s=at_s + rng.expovariate(5)) for at_s, spec in cancelled
        ),
        faults=tuple(draw_faults(rng, names, HORIZON_S, most=6)),
    )


def _draw_request(rng: random.Random, number: int) -> tuple[float, RequestSpec]:
    arrival_s = rng.uniform(0.0, HORIZON_S)
    spec = RequestSpec(
        request_id=RequestId(f"r{number}"),
        prompt=tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 200))),
        generation=Generation(
            max_tokens=rng.randint(1, 60),
            sampling=Sampling(seed=number),
            stop_token_ids=(rng.randrange(VOCAB),) if rng.random() < 0.3 else (),
        ),
        deadline_s=arrival_s + rng.uniform(0.1, 3.0) if rng.random() < 0.2 else None,
        allow_degraded_prefill=rng.random() < 0.3,
    )
    return arrival_s, spec


def run_scenario(scenario: Scenario, policy: Policy) -> tuple[World, Failure | None]:
    """Run to the end, or to the first broken invariant."""
    core = Core(simulated_config(**_BOUNDS), policy)
    world = World(core, random.Random(scenario.seed), LINK)
    try:
        _set_up(world, scenario)
        world.run(LONGEST_S)
    except (AssertionError, ValueError, KeyError) as error:
        message = f"{type(error).__name__}: {error}"
        return world, Failure(scenario=scenario, error=message, story=tuple(world.story))
    return world, None


def _set_up(world: World, scenario: Scenario) -> None:
    prefill = DeviceModel(read_token_s=0.0005, step_s=0.01, row_s=0.001)
    decode = replace(prefill, read_token_s=0.001)
    for number in range(scenario.prefill_nodes):
        world.add_node(_profile(f"p{number}", scenario), prefill)
    for number in range(scenario.decode_nodes):
        world.add_node(_profile(f"d{number}", scenario), decode)
    for arrival_s, spec in scenario.requests:
        world.submit_at(arrival_s, spec)
    for cancellation in scenario.cancellations:
        schedule_cancellation(world, cancellation)
    for fault in scenario.faults:
        schedule_fault(world, fault)


def _profile(name: str, scenario: Scenario) -> NodeProfile:
    return simulated_profile(
        name,
        "prefill" if name.startswith("p") else "decode",
        device_class="cpu-local",
        kv_blocks=scenario.kv_blocks,
        kv_bytes_per_token=1024,
        half_engine=scenario.half_engines,
    )


def shrink(failure: Failure, policy: Callable[[], Policy]) -> Failure:
    """Drop faults, cancellations and requests as long as the scenario still fails."""
    smallest = failure
    for field in ("faults", "cancellations", "requests"):
        index = 0
        while index < len(getattr(smallest.scenario, field)):
            kept = getattr(smallest.scenario, field)
            fewer = replace(smallest.scenario, **{field: kept[:index] + kept[index + 1 :]})
            _, again = run_scenario(_consistent(fewer), policy())
            if again is None:
                index += 1
            else:
                smallest = again
    return smallest


def _consistent(scenario: Scenario) -> Scenario:
    """Without cancellations of requests that are not there."""
    known = {spec.request_id for _, spec in scenario.requests}
    kept = tuple(one for one in scenario.cancellations if one.request_id in known)
    return replace(scenario, cancellations=kept)


def tell(failure: Failure) -> str:
    """A short story of what happened."""
    scenario = failure.scenario
    lines = [
        f"seed {scenario.seed}: {failure.error}",
        f"{scenario.prefill_nodes} prefill and {scenario.decode_nodes} decode nodes of {scenario.kv_blocks} blocks, "
        f"{len(scenario.requests)} requests, {len(scenario.faults)} faults",
        *failure.story[-STORY_LINES:],
    ]
    return "\n".join(lines)
