"""A node dies in the middle of an answer, its copy goes on, and not a token changes."""

import asyncio

import pytest

from edgellm.runtime.kv.copying.queue import CopyConfig
from edgellm.runtime.kv.types import Attempt
from tests.runtime.conftest import CONTRACT, LAYERS, attempt, eventually, one_by_one, random_prompt, staged_answer
from tests.runtime.takeover import Part, Request, on_nodes

ALL = range(LAYERS)
PROMPT, MAX_TOKENS = random_prompt(70, seed=9), 120
READER = {"reader": {"phase": "prefill"}}


def decoders(names: str, **options) -> dict[str, dict]:
    return READER | {name: {"phase": "decode", **options} for name in names}


def test_a_copy_goes_on_where_the_only_stage_died():
    expected = one_by_one(PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a", "b")])
        await request.protected(tokens=len(PROMPT) + 4)
        await request.read_tokens(6)
        watermark = request.watermark(request.parts[0])
        await nodes.kill("a")
        request.resume([Part(ALL, "b")], tokens=watermark)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("ab"))


@pytest.mark.parametrize("dies", ["a", "b"])
def test_the_other_stage_takes_over_and_carries_both(dies):
    expected = staged_answer((2, 1), PROMPT, MAX_TOKENS)
    survivor = "b" if dies == "a" else "a"

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(range(2), "a", "b"), Part(range(2, 3), "b", "a")])
        await request.protected(tokens=len(PROMPT) + 4)
        watermark = request.watermark(request.parts["ab".index(dies)])
        await request.read_tokens(6)
        await nodes.kill(dies)
        request.resume([Part(range(2), survivor), Part(range(2, 3), survivor)], tokens=watermark)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("ab", stage_layers=(2, 1)))


def test_two_faults_after_each_other_with_a_new_copy_in_between():
    """a and b write, c is a spare: b dies, c takes its stage, is protected anew, and dies too."""
    expected = staged_answer((2, 1), PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(range(2), "a", "c"), Part(range(2, 3), "b", "c")])
        await request.protected(tokens=len(PROMPT) + 4)
        watermark = request.watermark(request.parts[1])
        await request.read_tokens(4)
        await nodes.kill("b")
        request.resume([Part(range(2), "a", "c"), Part(range(2, 3), "c")], tokens=watermark)
        request.protect([Part(range(2), "a", "c"), Part(range(2, 3), "c", "a")])
        await request.protected(tokens=watermark + 4)
        second = request.watermark(request.parts[1])
        await request.read_tokens(8)
        await nodes.kill("c")
        request.resume([Part(range(2), "a"), Part(range(2, 3), "a")], tokens=second)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("abc", stage_layers=(2, 1)))


def test_a_holder_that_only_holds_follows_the_takeover():
    """Rows of the new epoch may outrun the command that lets c keep what it has."""
    expected = one_by_one(PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a", "c")])
        await request.protected(tokens=len(PROMPT) + 4)
        watermark = request.watermark(request.parts[0])
        await request.read_tokens(4)
        request.resume([Part(ALL, "a", "c")], tokens=watermark, holds=["c"])
        await request.protected(tokens=watermark + 4)
        second = request.watermark(request.parts[0])
        await nodes.kill("a")
        request.resume([Part(ALL, "c")], tokens=second)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("ac"))


@pytest.mark.parametrize("holder", ["late", "stranger"])
def test_a_takeover_of_more_than_is_held_is_refused(holder):
    """Nobody ever copied to one of them; the copy of the other ends where it was lost."""

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a", "late")])
        await request.protected(tokens=len(PROMPT))
        nodes.running["a"].server._replicator.stop(Attempt(request_id="r", epoch=0))
        await request.read_tokens(MAX_TOKENS - 1)
        await nodes.kill("a")
        request.resume([Part(ALL, holder)], tokens=len(PROMPT) + MAX_TOKENS)
        await eventually(request.failures)
        [failed] = request.failures()
        assert failed.attempt == attempt("r", 1)
        await request.release()

    on_nodes(test, decoders("a") | {name: {"phase": "decode"} for name in ("late", "stranger")})


def test_a_node_that_gives_its_stage_away_can_keep_the_copy_of_it():
    """As when it is slow: nobody dies, and carrier and holder change places."""
    expected = one_by_one(PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a", "b")])
        for source, holder in ("ab", "ba"):
            request.parts = [Part(ALL, source, holder)]
            await request.read_tokens(len(request.tokens) + 6)
            await request.protected(tokens=len(PROMPT) + len(request.tokens) - 4)
            watermark = request.watermark(request.parts[0])
            request.resume([Part(ALL, holder, source)], tokens=watermark, holds=[source])
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("ab"))


def test_copies_that_nobody_claims_are_kept_for_the_lease_only():
    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a", "b")])
        await request.protected(tokens=len(PROMPT) + 4)
        await nodes.kill("a")
        pool = nodes.running["b"].server.ledger.pool
        assert pool.free_blocks < pool.num_blocks
        await eventually(lambda: pool.free_blocks == pool.num_blocks)
        [released] = await nodes.running["b"].joined.wait_for("Released", "r")
        assert released.attempt.epoch == 0
        await request.release()

    on_nodes(test, decoders("ab"), lease_s=1.0)


def test_the_node_that_read_the_prompt_can_be_asked_for_a_copy_later():
    expected = one_by_one(PROMPT, MAX_TOKENS)

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a")])
        await nodes.running["reader"].joined.wait_for("KvSent", "r")
        request.protect([Part(ALL, "a", "reader")])
        await request.protected(tokens=len(PROMPT) + 4)
        watermark = request.watermark(request.parts[0])
        await request.read_tokens(4)
        await nodes.kill("a")
        request.resume([Part(ALL, "reader")], tokens=watermark)
        await request.read_tokens(MAX_TOKENS)
        assert request.tokens == expected
        await request.release()

    on_nodes(test, decoders("a") | {"reader": {"phase": "decode"}})


def test_an_answer_goes_on_from_int8_copies_too():
    """Its further tokens may differ: the KV is not bit for bit what it was."""

    async def test(nodes):
        request = Request(nodes, "r", PROMPT, MAX_TOKENS)
        await request.begin("reader", [Part(ALL, "a")])
        await request.read_tokens(6)
        request.protect([Part(ALL, "a", "b")])
        await request.protected(tokens=len(PROMPT) + 4)
        watermark = request.watermark(request.parts[0])
        received = nodes.running["b"].server._holder.counters
        assert received.bytes < 0.7 * received.tokens * CONTRACT.bytes_per_token
        await nodes.kill("a")
        request.resume([Part(ALL, "b")], tokens=watermark)
        await request.read_tokens(MAX_TOKENS)
        assert request.failures() == []
        await request.release()

    on_nodes(test, decoders("ab"), copies=CopyConfig(codec="int8"))


def test_many_answers_share_the_copies_stream():
    prompts = [random_prompt(tokens, seed=tokens) for tokens in (3, 31, 32, 50, 64, 65)]
    expected = [one_by_one(prompt, 60) for prompt in prompts]

    async def test(nodes):
        requests = [Request(nodes, f"r{number}", prompt, 60) for number, prompt in enumerate(prompts)]
        await asyncio.gather(*(request.begin("reader", [Part(ALL, "a", "b")]) for request in requests))
        for request in requests:
            await request.protected(tokens=len(request.prompt) + 4)
        watermarks = [request.watermark(request.parts[0]) for request in requests]
        for request in requests:
            await request.read_tokens(4)
        await nodes.kill("a")
        for request, watermark in zip(requests, watermarks, strict=True):
            request.resume([Part(ALL, "b")], tokens=watermark)
        for request in requests:
            await request.read_tokens(60)
        assert [request.tokens for request in requests] == expected

    on_nodes(test, decoders("ab"))
