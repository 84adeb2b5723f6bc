"""Faults that are put into the core and into the nodes on purpose: the simulator finds each of them."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from edgellm.engines.kv import HostKvPool
from edgellm.orchestrator.core import failures, on_node, on_request
from edgellm.orchestrator.core.nodes import Node
from edgellm.orchestrator.core.requests import Request
from edgellm.orchestrator.core.state import ClusterState
from edgellm.orchestrator.policies.dual_pool import DualPool
from edgellm.orchestrator.sim.clients import Ask
from edgellm.orchestrator.sim.faults import Fault
from edgellm.orchestrator.sim.fuzz import Scenario, draw_scenario, read_scenario, run_scenario
from edgellm.orchestrator.sim.machines import NodePlan
from edgellm.orchestrator.sim.story import Story
from edgellm.runtime import engine_loop
from edgellm.runtime.attempts import Attempts
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.copying.replicator import Replicator
from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.inbox import KvInbox
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.stages import wire as stage_wire

SEEDS_TO_FIND_A_MUTATION = range(100)
"""Where what is drawn has changed since."""


# In the core


def forget_epochs(patch):
    patch.setattr(ClusterState, "request_of", lambda state, attempt: state.requests.get(attempt.request_id))
    patch.setattr(Request, "working", lambda request, attempt: request.phase)


def never_release(patch):
    patch.setattr(ClusterState, "release", lambda state, request: None)


def overcommit_blocks(patch):
    patch.setattr(Node, "free_blocks", property(lambda node: node.profile.kv_blocks))


def begin_again_on_takeover(patch):
    queue_again = ClusterState.try_elsewhere

    def try_elsewhere(state, request, avoid, why, **how):
        request.tokens.clear()
        queue_again(state, request, avoid, why, **how)

    patch.setattr(ClusterState, "try_elsewhere", try_elsewhere)


def lose_requests_of_dead_nodes(patch):
    def bury_node(state, node, reason):
        state.nodes.bury(node)

    patch.setattr(failures, "bury_node", bury_node)
    patch.setattr(on_node, "bury_node", bury_node)


def ignore_deadlines_and_timeouts(patch):
    patch.setattr(on_request, "_check_bounds", lambda state, request: None)


# In the nodes


def admit_what_is_stale(patch):
    patch.setattr(EpochFence, "admits", lambda fence, attempt: True)


def admit_what_nobody_counts(patch):
    """Attempts of an orchestrator that is gone, from nodes that have not heard of the next."""
    patch.setattr(Attempts, "is_counted", True)
    patch.setattr(Attempts, "admits", lambda attempts, attempt: attempts.fence.admits(attempt))


def install_damaged_chunks(patch):
    patch.setattr(KvInbox, "_problem", lambda inbox, arriving, chunk: None)


def believe_damaged_hidden_states(patch):
    patch.setattr(stage_wire, "zlib", SimpleNamespace(crc32=lambda *_: 0))


def believe_damaged_tokens(patch):
    """Of a later stage, from which the first one goes on."""
    patch.setattr(stage_wire, "_checksum", lambda step_id, samples: 0)


def leak_blocks(patch):
    drop, count = BlockLedger.drop, iter(range(1_000_000))
    patch.setattr(
        BlockLedger, "drop", lambda ledger, attempt: None if next(count) % 20 == 19 else drop(ledger, attempt)
    )


def count_a_prompt_complete_too_early(patch):
    """When its last chunk is here, whatever is missing before it."""
    install = KvInbox._install

    def install_and_forget(inbox, arriving, chunk, missing):
        if chunk.where.tokens.stop == arriving.prompt_tokens:
            arriving.missing[...] = False
        return install(inbox, arriving, chunk, missing)

    patch.setattr(KvInbox, "_install", install_and_forget)


def copy_before_the_step_ended(patch):
    """Copies of a row that is not computed yet, and the watermark over it."""
    computed = Holdings.computed
    patch.setattr(
        Holdings, "computed", lambda holdings, attempt, layers, tokens: computed(holdings, attempt, layers, tokens + 1)
    )
    advance = Replicator.advance
    patch.setattr(
        Replicator, "advance", lambda copies, attempt, layers, done: advance(copies, attempt, layers, done + 1)
    )


def copy_other_rows(patch):
    """The rows one position before those that are named."""
    read = HostKvPool.read_rows
    patch.setattr(
        HostKvPool, "read_rows", lambda pool, blocks, tokens, layers: read(pool, blocks, (tokens + 31) % 32, layers)
    )


def round_hidden_states_too_much(patch):
    patch.setattr(engine_loop, "to_half", lambda hidden: (hidden // 2 * 2).astype(np.float16))


NODES = draw_scenario(0).nodes
STAGED = tuple(
    NodePlan(name=name, engine=engine, device=NODES[0].device, kv_blocks=64, spare=name == "s0")
    for name, engine in (
        ("p0", "prefill-tp0of1"),
        ("d0", "decode-pp0of2"),
        ("d1", "decode-pp1of2"),
        ("s0", "decode-pp0of2"),
    )
)


def staged(*faults):
    """Five long answers on two stages with a spare, and these faults: kind, victim, start and duration."""
    asks = tuple(Ask(name=f"r{n}", at_s=0.1 + 0.05 * n, prompt_tokens=150, max_tokens=60) for n in range(5))
    happen = tuple(Fault(kind=k, victim=v, other="d1", start_s=at_s, duration_s=for_s) for k, v, at_s, for_s in faults)
    return Scenario(seed=1, stages=2, journal=False, nodes=STAGED, asks=asks, faults=happen)


def kept(name):
    """A scenario that once failed."""
    return read_scenario(Path(__file__).parent / "scenarios" / f"{name}.json")


CALM = staged()
CRASH = staged(("crash", "d1", 0.9, 0.3))
TWO_CRASHES = staged(("crash", "d1", 0.8, 0.3), ("crash", "d0", 1.0, 0.3))
DAMAGE = staged(("corrupt", "p0", 0.0, 3.0))
DAMAGED_STEPS = staged(("corrupt", "d0", 0.0, 3.0))
DAMAGED_RESULTS = staged(("corrupt", "d1", 0.0, 3.0))
DISORDER = staged(
    ("reorder", "p0", 0.0, 3.0), ("reorder", "d0", 0.0, 3.0), ("reorder", "d1", 0.0, 3.0), ("crash", "d1", 0.9, 0.3)
)
MUTATIONS = {
    forget_epochs: draw_scenario(0),
    never_release: draw_scenario(0),
    overcommit_blocks: draw_scenario(1),
    begin_again_on_takeover: draw_scenario(0),
    lose_requests_of_dead_nodes: CRASH,
    ignore_deadlines_and_timeouts: draw_scenario(12),
    admit_what_is_stale: draw_scenario(10),
    admit_what_nobody_counts: kept("copy-that-begins-between-a-hello-and-its-welcome"),
    install_damaged_chunks: DAMAGE,
    believe_damaged_hidden_states: DAMAGED_STEPS,
    believe_damaged_tokens: DAMAGED_RESULTS,
    leak_blocks: CALM,
    count_a_prompt_complete_too_early: CRASH,
    copy_before_the_step_ended: CRASH,
    copy_other_rows: CRASH,
    round_hidden_states_too_much: CALM,
}
"""Each with a scenario that shows it."""


@pytest.mark.parametrize("scenario", [CALM, CRASH, TWO_CRASHES, DAMAGE, DAMAGED_STEPS, DAMAGED_RESULTS, DISORDER])
def test_without_them_nothing_is_found(scenario):
    assert run_scenario(scenario, DualPool, Story(wanted=False)) is None


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_faults_put_into_the_program_are_found(mutation, monkeypatch):
    mutation(monkeypatch)
    others = (draw_scenario(seed) for seed in SEEDS_TO_FIND_A_MUTATION)
    failures = (run_scenario(one, DualPool, Story(wanted=False)) for one in (MUTATIONS[mutation], *others))
    assert next((failure for failure in failures if failure is not None), None) is not None
