"""A node maps every stage it could carry; any run of them is one engine, and is what the stages give on their own."""

import asyncio
import dataclasses
from contextlib import AsyncExitStack

import numpy as np
import pytest

from edgellm.engines.base import Batch
from edgellm.engines.kv import HostKvPool
from edgellm.runtime.config import JoinConfig, NodeConfig
from edgellm.runtime.hello import introduce
from edgellm.runtime.kv.types import NodeId, Stage
from edgellm.runtime.loading import NodeEngines, load_engines
from edgellm.runtime.stages.engines import StageEngines, to_half
from edgellm.runtime.stages.routes import micro_batches, route_of
from tests.runtime.conftest import CONTRACT, LAYERS, greedy_answer, orchestrating, random_prompt
from tests.runtime.takeover import Nodes, Part, Request, Running
from tests.runtime.test_process import process


def config(bundle, engine: str, **options) -> NodeConfig:
    join = JoinConfig(orchestrator="127.0.0.1:1")
    return NodeConfig(node_id=NodeId("n"), bundle=bundle, engine=engine, join=join, kv_blocks=32, threads=1, **options)


def infos(options: NodeConfig, engines: NodeEngines) -> list[tuple[str, bool]]:
    hello = introduce(options, engines, exchange_address="", host_id="", held=(), highest_epoch=0)
    return [(one.name, one.planned) for one in hello.engines]


STAGES = [f"decode-pp{stage}of{LAYERS}" for stage in range(LAYERS)]


@pytest.mark.parametrize("engine", ["prefill-tp0of1", "decode-pp1of3", "decode-pp0of1"])
def test_every_stage_of_the_plan_is_mapped_on_one_pool_of_all_layers(staged_bundle, engine):
    options = config(staged_bundle, engine)
    engines = load_engines(options)
    stages = ["decode-pp0of1"] if engine == "decode-pp0of1" else STAGES
    assert infos(options, engines) == [(name, name == engine) for name in ["prefill-tp0of1", *stages]]
    assert engines.role == ("prefill" if engine.startswith("prefill") else "decode")
    assert engines.pool.layers == range(LAYERS)
    assert isinstance(engines.pool, HostKvPool)
    for one in engines.stages.stages:
        assert isinstance(one.kv, HostKvPool)
        assert np.shares_memory(one.kv.data, engines.pool.data)
    engines.pool.allocate(5)
    assert {one.kv.free_blocks for one in engines.all} == {27}
    engines.close()


def test_a_run_of_stages_is_what_the_stages_give_one_after_the_other(staged_bundle):
    """Bit for bit, with hidden states rounded between them; the same whatever the runs."""
    engines = load_engines(config(staged_bundle, "decode-pp0of3"))
    table = np.array([engines.pool.allocate(2)], np.int32)
    prompt = np.array(random_prompt(40), np.int32)
    batch = Batch(
        tokens=prompt, hidden=None, row_starts=np.array([0, 40], np.int32), first_positions=np.array([0], np.int32),
        block_tables=table, logit_rows=np.array([39], np.int32),
    )  # fmt: skip
    answers, kv = [], []
    for cut in ([range(3)], [range(1), range(1, 3)], [range(2), range(2, 3)], [range(1), range(1, 2), range(2, 3)]):
        step = batch
        engines.pool.data[...] = 0
        for layers in cut:
            engine = engines.stages.of(layers)
            assert engine is not None
            output = engine.forward(step)
            if output.hidden is not None:
                step = dataclasses.replace(batch, tokens=None, hidden=to_half(output.hidden).astype(np.float32))
        assert output.logits is not None
        answers.append(output.logits.copy())
        kv.append(engines.pool.data.copy())
    assert all(np.array_equal(answer, answers[0]) for answer in answers)
    assert all(np.array_equal(one, kv[0]) for one in kv)
    engines.close()


def test_runs_that_are_cut_otherwise_or_are_not_here_are_none(staged_bundle):
    engines = load_engines(config(staged_bundle, "decode-pp0of3"))
    assert engines.stages.of(range(1, 3)) is engines.stages.of(range(1, 3))
    first, _, last = engines.stages.stages
    some = StageEngines([last, first], engines.pool)
    assert some.of(range(1)) is first
    assert some.of(range(2, 3)) is last
    assert some.of(range(2)) is some.of(range(1, 2)) is some.whole is None
    engines.close()


def test_hidden_states_saturate():
    hidden = np.array([[1e9, -1e9, 65504.0, 65519.0, 1 / 3]], np.float32)
    assert to_half(hidden).tolist() == [[65504.0, -65504.0, 65504.0, 65504.0, float(np.float16(1 / 3))]]


def stage(name: str, first: int, count: int = 1) -> Stage:
    return Stage(node_id=NodeId(name), address=name, host_id=name.upper(), first_layer=first, num_layers=count)


def test_neighbours_on_one_node_are_one_leg():
    route = route_of([stage("a", 0), stage("a", 1), stage("b", 2, 2), stage("a", 4)], 5)
    assert [(leg.node_id, leg.layers, leg.first_stage) for leg in route] == [
        ("a", range(2), 0), ("b", range(2, 4), 2), ("a", range(4, 5), 3),
    ]  # fmt: skip
    assert micro_batches(route) == 2


@pytest.mark.parametrize("stages", [[], [stage("a", 0)], [stage("a", 1), stage("b", 0)], [stage("a", 0, 3)]])
def test_stages_that_do_not_make_up_the_model_are_refused(stages):
    with pytest.raises(ValueError, match="the model has 2 layers"):
        route_of(stages, 2)


def expected_text(bundle, prompt: list[int], max_tokens: int) -> list[int]:
    engines = load_engines(config(bundle, "decode-pp0of3"))
    assert engines.half is not None
    assert engines.stages.whole is not None
    answer = greedy_answer(engines.half, prompt, max_tokens, engines.stages.whole)
    engines.close()
    return answer


@pytest.mark.parametrize("carriers", ["ab", "abc"])
def test_processes_in_a_pipeline_write_what_the_stages_give_directly(staged_bundle, carriers):
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (64, 40, 7, 1)]
    cut = {"ab": [range(1), range(1, 3)], "abc": [range(1), range(1, 2), range(2, 3)]}[carriers]

    async def run() -> None:
        async with AsyncExitStack() as stack:
            nodes = Nodes(await stack.enter_async_context(orchestrating()))
            for number, name in enumerate(["reader", *carriers]):
                engine = "prefill-tp0of1" if name == "reader" else f"decode-pp{number - 1}of3"
                options = ("--join-timeout", "20")
                _, joined = await stack.enter_async_context(
                    process(nodes.orchestrator, staged_bundle, name, engine, *options)
                )
                nodes.running[name] = Running(server=None, joined=joined, task=None)
            requests = [Request(nodes, f"r{number}", prompt, 100) for number, prompt in enumerate(prompts)]
            parts = [Part(layers, name) for layers, name in zip(cut, carriers, strict=True)]
            await asyncio.gather(*(request.begin("reader", parts) for request in requests))
            for request in requests:
                await request.read_tokens(100)
                assert request.tokens == expected_text(staged_bundle, request.prompt, 100)
                await request.release()

    asyncio.run(run())


def test_the_bundles_contract_is_that_of_every_stage(staged_bundle):
    engines = load_engines(config(staged_bundle, "decode-pp2of3"))
    assert {one.kv.contract for one in engines.all} == {CONTRACT}
    engines.close()
