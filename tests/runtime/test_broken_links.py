"""Links that delay, cut, block and damage what nodes send each other: tokens stay the same, or the node says so."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from edgellm.runtime.kv.copying.queue import CopyConfig
from edgellm.runtime.stages import local, servicer
from edgellm.runtime.stages.wire import result_to_proto
from tests.runtime.conftest import CONTRACT, LAYERS, eventually, one_by_one, random_prompt, staged_answer
from tests.runtime.copies import Holder, attempt, row
from tests.runtime.proxy import Proxy, proxied
from tests.runtime.takeover import Part, Request, on_nodes
from tests.runtime.test_copy_stream import PATIENT, Source, holds, serving
from tests.runtime.test_copy_stream import servicer as copy_servicer

ALL = range(LAYERS)
PROMPT, MAX_TOKENS = random_prompt(70, seed=4), 100
DECODERS = {"reader": {"phase": "prefill"}, "a": {"phase": "decode"}, "b": {"phase": "decode"}}
SLOW_S = 0.05
"""Of every step, both ways: so slow that the answer is not over before the trouble, however busy the machine."""
STAGED = {name: options | {"stage_layers": (2, 1)} for name, options in DECODERS.items()}


def copying_through(test, config: CopyConfig = PATIENT):
    """Run `test(source, holder, proxy)`; the source reaches the holder through the proxy."""
    holder = Holder(64)

    async def run() -> None:
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serving(copy_servicer(holder)))
            proxy = await stack.enter_async_context(proxied(address))
            source = Source(config)
            stack.push_async_callback(source.close)
            async with asyncio.timeout(60):
                await test(source, holder, proxy)

    asyncio.run(run())


def test_damaged_rows_are_found_and_sent_again():
    async def test(source, holder, proxy):
        proxy.damage = row(hash((attempt(), 3)) % 2**32)[0, 0, :12].tobytes(), 2
        source.begin(attempt(), proxy.address, tokens=5)
        await eventually(lambda: holds(holder, attempt(), 5))
        assert proxy.damage[1] == 0
        assert holder.copies.counters.refused == 2
        source.compute(attempt(), 30)
        await eventually(lambda: holds(holder, attempt(), 30))
        assert source.lost == {}

    copying_through(test)


def test_a_link_that_was_cut_loses_the_copy_and_takes_a_new_one():
    async def test(source, holder, proxy):
        source.begin(attempt(), proxy.address, tokens=60)
        await eventually(lambda: holder.holdings.reach(attempt(), range(1, LAYERS)))
        proxy.cut()
        source.compute(attempt(), 80)
        await eventually(lambda: source.lost)
        source.keep(attempt(), proxy.address)
        await eventually(lambda: holds(holder, attempt(), 80))

    copying_through(test)


def test_answers_that_do_not_come_back_end_the_copy():
    """The network is cut one way: rows arrive, acknowledgements do not."""

    async def test(source, holder, proxy):
        source.begin(attempt("a"), proxy.address, tokens=5)
        await eventually(lambda: holds(holder, attempt("a"), 5))
        proxy.block("down")
        source.compute(attempt("a"), 40)
        await eventually(lambda: source.lost)
        assert "no answer" in source.lost[attempt("a"), proxy.address]

    copying_through(test, CopyConfig(patience_s=0.5))


def test_a_slow_link_is_given_what_it_can_carry():
    async def test(source, holder, proxy):
        proxy.delay_s = 0.02
        source.begin(attempt(), proxy.address, tokens=1)
        for tokens in range(2, 81):
            source.compute(attempt(), tokens)
            await asyncio.sleep(0.001)
        await eventually(lambda: holds(holder, attempt(), 80))
        assert source.lost == {}

    copying_through(test)


@pytest.mark.parametrize("trouble", ["delay", "damage"])
def test_the_prompts_kv_arrives_through_a_bad_link(trouble):
    expected = one_by_one(PROMPT, 20)

    async def test(nodes):
        async with proxied(nodes.running["a"].joined.hello.exchange_address) as proxy:
            nodes.addresses["a"] = proxy.address
            request = Request(nodes, "r", PROMPT, 20)
            if trouble == "delay":
                proxy.delay_s = 0.02
            else:
                damage_kv(proxy)
            await request.begin("reader", [Part(ALL, "a")])
            await request.read_tokens(20)
            assert request.tokens == expected
            assert proxy.forwarded_bytes > len(PROMPT) * CONTRACT.bytes_per_token
            assert trouble == "delay" or nodes.running["a"].server._inbox.counters.corrupt == 1
            await request.release()

    on_nodes(test, DECODERS, allow_shm=False)


def damage_kv(proxy: Proxy) -> None:
    """Once, in the first chunk: its checksum follows the name of the codec."""
    proxy.damage = b"raw\x49", 1


@pytest.mark.parametrize("locally", [False, True], ids=["grpc", "local"])
@pytest.mark.parametrize("trouble", ["delay", "cut", "damaged step", "damaged result"])
def test_steps_between_stages_through_a_bad_link(trouble, locally, monkeypatch):
    """A delay changes nothing; what is cut or damaged stalls the answer, and it goes on from the copies."""
    expected = staged_answer((2, 1), PROMPT, MAX_TOKENS)

    async def test(nodes):
        address = nodes.running["b"].joined.hello.exchange_address
        async with proxied(address, steps_locally=locally) as proxy:
            nodes.addresses["b"] = proxy.address
            proxy.delay_s = 0.002 if trouble == "delay" else SLOW_S
            request = Request(nodes, "r", PROMPT, MAX_TOKENS)
            await request.begin("reader", [Part(range(2), "a", "b"), Part(range(2, 3), "b", "a")])
            await request.protected(tokens=len(PROMPT) + 4)
            await request.read_tokens(6)
            if trouble != "delay":
                watermark = request.watermark(request.parts[1])
                again = make_trouble(proxy, trouble, monkeypatch)
                await eventually(lambda: again() or broken(nodes.running["a"]))
                proxy.heal()
                request.resume([Part(range(2), "a", "b"), Part(range(2, 3), "b", "a")], tokens=watermark)
            await request.read_tokens(MAX_TOKENS)
            assert request.tokens == expected
            assert request.failures() == []
            await request.release()
            assert proxy.took_steps_locally == locally

    on_nodes(test, STAGED, allow_shm=False)


def make_trouble(proxy: Proxy, trouble: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Damaged are the hidden states of one row: they follow `sample`, and their own tag and length, 64 bytes;
    or one token, after its checksum was computed. Returns what has to be repeated: a cut between two steps, while
    the first stage computes, loses nothing, and the answer goes on."""
    match trouble:
        case "cut":
            return proxy.cut
        case "damaged step":
            proxy.damage = b"\x20\x01\x22\x40", 1
        case _:
            damage_a_token(monkeypatch)
    return lambda: None


def damage_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    damages = iter([0x01])

    def damaged(result):
        message = result_to_proto(result)
        message.samples[0].token.token_id ^= next(damages, 0)
        return message

    for module in (local, servicer):
        monkeypatch.setattr(module, "result_to_proto", damaged)


def broken(running) -> bool:
    return any(event.WhichOneof("message") == "pipeline_broken" for event in running.joined.events)
