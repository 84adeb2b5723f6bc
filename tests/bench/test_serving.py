"""Requests that arrive at random, and what their clients see of a small server of server-sent events."""

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serving.arrivals import poisson
from bench.serving.clients import Client, OpenAiClient, RequestError, observe
from bench.serving.comparison import OURS, targets, unlike
from bench.serving.load import measure, warm_up
from bench.serving.observations import Observation, Step, highest_rate, percentile, summarise
from bench.serving.servers import Running


class TestArrivals:
    @given(rate=st.floats(0.1, 50), duration=st.floats(0.1, 60), seed=st.integers(0, 100))
    def test_they_ascend_within_the_time_and_repeat(self, rate: float, duration: float, seed: int) -> None:
        times = poisson(rate, duration, seed)
        assert times == sorted(times) == poisson(rate, duration, seed)
        assert all(0 <= time < duration for time in times)

    def test_there_are_about_as_many_as_the_rate_says(self) -> None:
        assert len(poisson(10, 600, seed=0)) == pytest.approx(6000, rel=0.05)


class TestPercentile:
    def test_it_is_a_value_that_was_seen(self) -> None:
        assert [percentile(range(1, 101), percent) for percent in (50, 99, 100)] == [50, 99, 100]
        assert percentile([7.0], 99) == 7

    def test_of_nothing_there_is_none(self) -> None:
        assert percentile([], 99) is None


def step(rate: float, ttft_s: float = 0.1, server: str = OURS, unanswered: int = 0, weights: str = "int4") -> Step:
    seen = [Observation(first_token_s=ttft_s, last_token_s=ttft_s + 0.63, tokens=64)] * 10
    return summarise(server, weights, rate, 10 + unanswered, seen, whole_s=10, others=0)


class TestHolding:
    def test_both_bounds_and_every_answer_are_needed(self) -> None:
        assert step(4).holds
        assert (step(4).tpot_p50_ms, step(4).tokens_per_s) == (pytest.approx(10), 64)
        assert not step(4, ttft_s=0.4).holds
        assert not step(4, unanswered=1).holds
        assert not summarise(OURS, "int4", 4, 10, [], whole_s=1, others=0).holds

    def test_the_highest_rate_is_below_the_first_that_failed(self) -> None:
        steps = [step(8), step(4), step(6, ttft_s=1)]
        assert highest_rate(steps, OURS) == 4
        assert highest_rate(steps, "another") == 0

    def test_ours_is_held_to_its_rate_and_to_its_peers(self) -> None:
        found = targets([step(10), step(12, ttft_s=1), step(12, server="peer")])
        assert [(target.target, target.met) for target in found] == [(10, True), (12, False)]


SHORT, LAST, HANGS_UP = [1], [1, 2], [1, 2, 3, 4]
"""Prompts that are refused, that are the last of their connection, and that the server promises more after."""


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class SmallServer:
    """Three tokens for a prompt, in chunks, over connections that are kept."""

    def __init__(self) -> None:
        self.connections = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self.answer(reader, writer):
                pass
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split()[0])
        prompt = json.loads(await reader.readexactly(length))["prompt"]
        if prompt == SHORT:
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\nprompt too short")
            return False
        close = b"Connection: close\r\n" if prompt == LAST else b""
        writer.write(b"HTTP/1.1 200 OK\r\n%sTransfer-Encoding: chunked\r\n\r\n" % close)
        for _ in range(3):
            writer.write(chunk(b'data: {"choices": []}\n\n'))
            await writer.drain()
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await writer.drain()
        return prompt not in (LAST, HANGS_UP)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    ports: list[int] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        server = await asyncio.start_server(SmallServer().serve, "127.0.0.1", 0)
        async with server:
            ports.append(server.sockets[0].getsockname()[1])
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield ports[0]
    stop.set()
    thread.join()


@pytest.fixture
def running(port: int) -> Running:
    @contextlib.asynccontextmanager
    async def client() -> AsyncIterator[Client]:
        async with contextlib.aclosing(OpenAiClient(port, "a model")) as client:
            yield client

    return Running(pid=os.getpid(), client=client)


def test_weights_of_more_bits_are_named() -> None:
    (sentence,) = unlike([step(4), step(4, server="vLLM", weights="bf16"), step(6, server="vLLM", weights="bf16")])
    assert "vLLM has bf16 weights" in sentence


class TestClient:
    def test_arrivals_are_seen_in_order(self, port: int) -> None:
        seen = asyncio.run(observe(OpenAiClient(port, "a model"), LAST, 3))
        assert 0 < seen.first_token_s <= seen.last_token_s
        assert seen.tokens == 3

    @pytest.mark.parametrize(
        ("prompts", "connections"),
        [([[1, 2, 3]] * 4, 1), ([LAST, LAST], 2), ([HANGS_UP, HANGS_UP], 2)],
        ids=["kept", "the server says that it closes", "the server closes without a word"],
    )
    def test_a_connection_is_kept_as_long_as_the_server_keeps_it(
        self, prompts: list[list[int]], connections: int
    ) -> None:
        async def ask() -> int:
            small = SmallServer()
            async with (
                await asyncio.start_server(small.serve, "127.0.0.1", 0) as server,
                contextlib.aclosing(OpenAiClient(server.sockets[0].getsockname()[1], "a model")) as client,
            ):
                for prompt in prompts:
                    assert (await observe(client, prompt, 3)).tokens == 3
            return small.connections

        assert asyncio.run(ask()) == connections

    def test_a_refusal_is_reported_with_its_reason(self, port: int) -> None:
        with pytest.raises(RequestError, match=r"400 Bad Request.*prompt too short"):
            asyncio.run(observe(OpenAiClient(port, "a model"), SHORT, 3))

    def test_a_server_that_is_not_there_is_an_error_of_the_request(self) -> None:
        with pytest.raises(RequestError):
            asyncio.run(observe(OpenAiClient(1, "a model"), [1, 2], 3))


def test_a_rate_is_measured_from_arrivals_to_answers(running: Running) -> None:
    warm_up(running)
    found = measure("server", "int4", running, rate_per_s=40, duration_s=0.5)
    assert found.requests == len(poisson(40, 0.5, seed=0))
    assert found.unfinished == 0
    assert found.ttft_p50_ms is not None
    assert found.tokens_per_s > 0
