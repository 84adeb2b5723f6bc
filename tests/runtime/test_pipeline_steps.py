"""Nodes over a network that delivers when chance says so: any order of arrivals gives the tokens of one node."""

import random
from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engines.kv import HostKvPool
from edgellm.engines.sampling import SamplingParams
from edgellm.runtime.engine_loop import run_step
from edgellm.runtime.generation import Generation
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.inbox import PromptPart
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, NodeId, RequestId, Stage
from edgellm.runtime.lanes import DecodeLane, Lanes
from edgellm.runtime.lifecycle import Exchanges
from edgellm.runtime.messages import Decode, Event, PipelineBroken, Release, Released, RequestFailed, Tokens
from edgellm.runtime.node import Node
from edgellm.runtime.stages.messages import StageResult, StageStep
from edgellm.runtime.stages.pipelines import STEP_PATIENCE_S
from edgellm.runtime.stages.routes import Leg
from tests.runtime.conftest import (
    LAYERS,
    MAX_SEQ_LEN,
    greedy_answer,
    random_prompt,
    staged_answer,
    tiny_engine,
    tiny_pool,
    tiny_stages,
)

GREEDY = SamplingParams(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, logit_bias={}, seed=1
)  # fmt: skip


class Nothing:
    """This node neither sends nor receives nor copies KV."""

    def cancel(self, attempt: Attempt) -> None: ...
    def forget(self, attempt: Attempt) -> None: ...
    def stop(self, attempt: Attempt) -> None: ...
    def advance(self, *progress: object) -> None: ...


class Network:
    """Messages in order on each way: who opened the stream, to whom, and what goes there."""

    def __init__(self) -> None:
        self.ways: defaultdict[tuple[str, str, str], deque[Callable[[], None]]] = defaultdict(deque)
        self.nodes: dict[str, Machine] = {}

    def busy(self) -> list[tuple[str, str, str]]:
        return [way for way, messages in self.ways.items() if messages]


class Source:
    """The way back of the steps that `opener` sends to `node`."""

    def __init__(self, network: Network, opener: str, node: str) -> None:
        self.network, self.opener, self.node = network, opener, node

    def answer(self, result: StageResult) -> None:
        opener = self.network.nodes[self.opener].node
        self.network.ways[self.opener, self.node, "results"].append(lambda: opener.stage_result(result, 0.0))


class Machine:
    """A node of which every part but the engines is the test's."""

    def __init__(self, name: str, network: Network, counts: tuple[int, ...], max_rows: int, max_sequences: int) -> None:
        self.name, self.network = name, network
        self.pool = tiny_pool(64)
        self.ledger = BlockLedger(self.pool)
        self.holdings = Holdings(self.ledger)
        self.events: list[Event] = []
        self.sources: dict[str, Source] = {}
        stages = tiny_stages(self.pool, counts, max_rows=max_rows, max_sequences=max_sequences)
        self.node = Node(
            node_id=NodeId(name), lanes=Lanes(half=None, degraded=None, stages=stages, num_layers=LAYERS),
            ledger=self.ledger, holdings=self.holdings, emit=self.events.append, wake=lambda: None,
        )  # fmt: skip
        self.node.welcome(first_epoch=0)
        nothing = Nothing()
        self.node.connect(Exchanges(transfers=nothing, arrivals=nothing, copies=nothing, links=self))

    def send(self, leg: Leg, step: StageStep) -> None:
        there = self.network.nodes[leg.node_id]
        source = there.sources.setdefault(self.name, Source(self.network, self.name, there.name))
        self.network.ways[self.name, there.name, "steps"].append(lambda: there.node.stage_step(step, source, 0.0))

    def install(self, attempt: Attempt, source: HostKvPool, blocks: list[int], tokens: int, layers: range) -> None:
        """What the KV exchange does."""
        assert self.node.lifecycle.admit(attempt)
        if attempt not in self.ledger:
            self.ledger.reserve(attempt, MAX_SEQ_LEN // 4)
        mine = self.ledger.blocks(attempt)[: len(blocks)]
        for layer in layers:
            self.pool.write(mine, layer, source.read(blocks[: len(mine)], layer))
        self.node.kv_complete(attempt, PromptPart(layers=layers, tokens=tokens, backup=False))

    def step(self, lane) -> bool:
        planned = self.node.next_step(lane, 0.0)
        if planned is not None:
            self.node.step_ended(planned, run_step(planned.engine, planned.step), 0.0)
        return planned is not None


class Cluster:
    """The pipeline, its requests, and an orchestrator that resumes what stalls."""

    def __init__(
        self, rng: random.Random, counts: tuple[int, ...], carriers: str, prompts: list[list[int]],
        limits: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        """`limits`: rows and sequences of a step; drawn where they are not given."""
        self.rng, self.network = rng, Network()
        limits = limits or (rng.randint(2, 32), rng.randint(1, 4))
        for name in sorted(set(carriers)):
            self.network.nodes[name] = Machine(name, self.network, counts, *limits)
        firsts = [sum(counts[:stage]) for stage in range(len(counts))]
        self.stages = tuple(
            Stage(node_id=NodeId(name), address=name, host_id=name, first_layer=first, num_layers=count)
            for name, first, count in zip(carriers, firsts, counts, strict=True)
        )
        self.prompts = prompts
        self.epochs = [0] * len(prompts)
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.taken: dict[str, int] = defaultdict(int)
        self.resumes = 0
        self.told: list[Callable[[], None]] = []

    def attempt(self, number: int) -> Attempt:
        return Attempt(request_id=RequestId(str(number)), epoch=self.epochs[number])

    def start(self, number: int, max_tokens: int) -> None:
        """Read the prompt; what must be told to whom, in any order."""
        pool, told = tiny_pool(16), self.told
        prompt = self.prompts[number]
        first = greedy_answer(tiny_engine("prefill", pool, max_rows=MAX_SEQ_LEN), prompt, 1)
        self.answers[number] = self.answers[number] or first
        blocks = list(range(12))
        for stage in self.stages:
            machine = self.network.nodes[stage.node_id]
            told.append(
                lambda machine=machine, layers=stage.layers: machine.install(
                    self.attempt(number), pool, blocks, len(prompt), layers
                )
            )
        command = self.command(number, max_tokens)
        told += [lambda machine=machine: machine.node.decode(command, 0.0) for machine in self.network.nodes.values()]
        self.rng.shuffle(told)

    def command(self, number: int, max_tokens: int, resume_from: Attempt | None = None) -> Decode:
        return Decode(
            attempt=self.attempt(number), prompt=np.array(self.prompts[number], np.int32),
            generated=np.array(self.answers[number], np.int32), kv_timeout_s=1.0, stages=self.stages,
            generation=Generation(sampling=GREEDY, max_tokens=max_tokens, stop_token_ids=frozenset()),
            resume_from=resume_from, resume_tokens=len(self.prompts[number]) + len(self.answers[number]) // 2,
        )  # fmt: skip

    def take_events(self, max_tokens: int) -> None:
        for machine in self.network.nodes.values():
            for event in machine.events[self.taken[machine.name] :]:
                match event:
                    case Tokens(tokens=tokens):
                        for one in tokens:
                            number = int(one.attempt.request_id)
                            if one.attempt == self.attempt(number):
                                assert one.token.index == len(self.answers[number])
                                self.answers[number].append(one.token.token_id)
                    case PipelineBroken(attempts=attempts):
                        for old in attempts:
                            self.resume(old, max_tokens)
                    case RequestFailed(attempt=failed):
                        self.read_again(failed, max_tokens)
            self.taken[machine.name] = len(machine.events)

    def read_again(self, failed: Attempt, max_tokens: int) -> None:
        """The last stage had finished the answer, and let go of it, when the others were told to resume it."""
        number = int(failed.request_id)
        if failed == self.attempt(number):
            assert self.resumes
            self.epochs[number] += 1
            self.start(number, max_tokens)

    def resume(self, old: Attempt, max_tokens: int) -> None:
        number = int(old.request_id)
        if old == self.attempt(number) and len(self.answers[number]) < max_tokens:
            self.epochs[number] += 1
            self.resumes += 1
            command = self.command(number, max_tokens, old)
            for machine in self.network.nodes.values():
                self.network.ways["orchestrator", machine.name, "commands"].append(
                    lambda machine=machine: machine.node.decode(command, 0.0)
                )

    def break_way(self) -> None:
        """A stream ends: what was on it is lost, both ends hear of it."""
        machine = self.rng.choice(list(self.network.nodes.values()))
        if machine.sources:
            upstream = self.rng.choice(sorted(machine.sources))
            self.network.ways[upstream, machine.name, "steps"].clear()
            self.network.ways[upstream, machine.name, "results"].clear()
            machine.node.stage_source_gone(machine.sources.pop(upstream))
            self.network.nodes[upstream].node.stage_broken(NodeId(machine.name), 0.0)

    def act(self) -> bool:
        """One thing happens somewhere; False if nothing can."""
        ways = self.network.busy()
        if ways and self.rng.random() < 0.5:
            self.network.ways[self.rng.choice(ways)].popleft()()
            return True
        machines = list(self.network.nodes.values())
        self.rng.shuffle(machines)
        for machine in machines:
            lanes = list(machine.node.lanes.in_turn)
            self.rng.shuffle(lanes)
            if any(machine.step(lane) for lane in lanes):
                return True
        if ways:
            self.network.ways[ways[0]].popleft()()
        return bool(ways)

    def run(self, max_tokens: int, breaks: float) -> None:
        for number in range(len(self.prompts)):
            self.start(number, max_tokens)
        while self.told or any(len(answer) < max_tokens for answer in self.answers):
            acted = self.act()
            if self.told and (not acted or self.rng.random() < 0.2):
                self.told.pop()()
                acted = True
            self.take_events(max_tokens)
            assert acted or self.told
            if not self.told and self.rng.random() < breaks:
                self.break_way()
                self.take_events(max_tokens)

    def release(self) -> None:
        """Everything is free again, and says so."""
        for machine in self.network.nodes.values():
            for number in range(len(self.prompts)):
                machine.node.release(Release(attempt=self.attempt(number)))
            released = [event for event in machine.events if isinstance(event, Released)]
            assert len(released) == len(self.prompts)
            machine.ledger.check_integrity()
            assert machine.pool.free_blocks == machine.pool.num_blocks
            assert machine.node.running == machine.node.waiting == 0


def test_rows_after_a_catch_up_step_that_was_lost_are_lost_too():
    """The KV of a later stage comes after its patience with the first step, which has no sample, has ended."""
    cluster = Cluster(random.Random(0), (1, 2), "ab", [random_prompt(5)], limits=(2, 1))
    front, back = cluster.network.nodes["a"], cluster.network.nodes["b"]
    cluster.answers[0] = staged_answer((1, 2), cluster.prompts[0], 9)
    command, one, pool = cluster.command(0, 20), cluster.attempt(0), tiny_pool(16)
    greedy_answer(tiny_engine("prefill", pool, max_rows=MAX_SEQ_LEN), cluster.prompts[0], 1)
    for machine in (front, back):
        machine.node.decode(command, 0.0)
    front.install(one, pool, list(range(12)), 5, range(1))
    [lane] = [lane for lane in front.node.lanes.in_turn if isinstance(lane, DecodeLane)]
    assert front.step(lane)
    cluster.network.ways["a", "b", "steps"].popleft()()
    assert back.node.next_step(back.node.lanes.later, STEP_PATIENCE_S) is None
    back.install(one, pool, list(range(12)), 5, range(1, 3))
    while cluster.act() or cluster.network.busy():
        assert back.holdings.reach(one, range(1, 3)) == 5
    assert [event for event in back.events if isinstance(event, Tokens)] == []
    assert front.events == [PipelineBroken(peer=NodeId("b"), attempts=(one,))]


def test_copies_of_a_newer_attempt_wait_for_the_orchestrator_that_may_have_begun_it():
    cluster = Cluster(random.Random(0), (3,), "a", [random_prompt(5)])
    lifecycle = cluster.network.nodes["a"].node.lifecycle
    held, newer = (Attempt(request_id=RequestId("held"), epoch=epoch) for epoch in (5, 6))
    other = Attempt(request_id=RequestId("other"), epoch=7)
    assert lifecycle.admit_copy(held) == "admitted"
    lifecycle.attempts.orchestrator_lost()
    assert [lifecycle.admit_copy(one) for one in (held, newer, other)] == ["admitted", "early", "early"]
    lifecycle.attempts.welcome(first_epoch=7)
    assert [lifecycle.admit_copy(one) for one in (held, newer, other)] == ["admitted", "stale", "admitted"]


cuts = st.sampled_from([((1, 1, 1), "abc"), ((1, 2), "ab"), ((2, 1), "ab"), ((1, 1, 1), "aba"), ((1, 1, 1), "aab"),
                        ((3,), "a")])  # fmt: skip


@settings(max_examples=30)
@given(cuts, st.integers(0, 2**32), st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(2, 9))
def test_any_order_of_arrivals_gives_the_tokens_of_one_node(cut, seed, lengths, max_tokens):
    counts, carriers = cut
    prompts = [random_prompt(length, seed=length) for length in lengths]
    cluster = Cluster(random.Random(seed), counts, carriers, prompts)
    cluster.run(max_tokens, breaks=0.0)
    assert cluster.answers == [staged_answer(counts, prompt, max_tokens) for prompt in prompts]
    cluster.release()


@settings(max_examples=30)
@given(cuts, st.integers(0, 2**32), st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(4, 12))
def test_streams_that_break_lose_nothing(cut, seed, lengths, max_tokens):
    counts, carriers = cut
    prompts = [random_prompt(length, seed=length) for length in lengths]
    cluster = Cluster(random.Random(seed), counts, carriers, prompts)
    cluster.run(max_tokens, breaks=0.05)
    assert cluster.answers == [staged_answer(counts, prompt, max_tokens) for prompt in prompts]
    cluster.release()
