"""Real processes on real weights: a stage is killed in the middle of an answer, and the text is the same."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.runtime.conftest import orchestrating
from tests.runtime.takeover import Nodes, Part, Request, Running
from tests.runtime.test_process import process

PROMPT = [1, *range(3, 90)]
MAX_TOKENS = 300


@pytest.mark.parametrize("dies", ["first", "second"])
def test_a_killed_stage_costs_no_token(staged_stories, dies):
    async def run() -> None:
        async with AsyncExitStack() as stack:
            nodes = Nodes(await stack.enter_async_context(orchestrating()))
            children = {}
            for name, engine in (("reader", "prefill-tp0of1"), ("first", "decode-pp0of2"), ("second", "decode-pp1of2")):
                child, joined = await stack.enter_async_context(
                    process(nodes.orchestrator, staged_stories, name, engine, "--join-timeout", "20")
                )
                children[name], nodes.running[name] = child, Running(server=None, joined=joined, task=None)
            async with asyncio.timeout(200):
                await answer_and_kill(nodes, children, dies)

    asyncio.run(run())


async def answer_and_kill(nodes: Nodes, children: dict, dies: str) -> None:
    first, second = range(cut(nodes)), range(cut(nodes), 5)
    parts = [Part(first, "first", "second"), Part(second, "second", "first")]
    calm, hit = (Request(nodes, name, PROMPT, MAX_TOKENS) for name in ("calm", "hit"))
    await calm.begin("reader", parts)
    await calm.read_tokens(MAX_TOKENS)
    await calm.release()
    await hit.begin("reader", parts)
    await hit.protected(tokens=len(PROMPT) + 8)
    await hit.read_tokens(12)
    watermark = hit.watermark(parts[dies == "second"])
    del nodes.running[dies]
    children[dies].kill()
    survivor = "first" if dies == "second" else "second"
    hit.resume([Part(first, survivor), Part(second, survivor)], tokens=watermark)
    await hit.read_tokens(MAX_TOKENS)
    assert hit.tokens == calm.tokens
    assert hit.failures() == []
    await hit.release()


def cut(nodes: Nodes) -> int:
    """The first layer of the second stage, as the plan has it."""
    planned = [one for one in nodes.running["second"].joined.hello.engines if one.planned]
    return planned[0].first_layer
