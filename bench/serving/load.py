"""Requests at one rate against a running server, from arrival to the last token or the end of patience."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Final

from bench import busy
from bench.serving.arrivals import poisson
from bench.serving.clients import Client, RequestError, observe
from bench.serving.observations import Observation, Step, summarise
from bench.serving.servers import Running

PROMPT_TOKENS: Final = 128
ANSWER_TOKENS: Final = 64
PATIENCE_S: Final = 20.0
"""After the last arrival; what is not answered by then counts as unfinished."""
WARM_UP_REQUESTS: Final = 4
_TOKEN_IDS: Final = range(300, 30000)


def measure(name: str, weights: str, running: Running, rate_per_s: float, duration_s: float) -> Step:
    """One step of the table. Prompts differ from each other, and are the same for every server."""
    arrivals_s = poisson(rate_per_s, duration_s, seed=0)
    chance = random.Random(round(1000 * rate_per_s))
    prompts = [chance.choices(_TOKEN_IDS, k=PROMPT_TOKENS) for _ in arrivals_s]
    before = busy.read_times(busy.family(running.pid))
    started_s = time.perf_counter()
    seen = asyncio.run(_ask_all(running, arrivals_s, prompts))
    whole_s = time.perf_counter() - started_s
    shares = busy.shares(before, busy.read_times(busy.family(running.pid)), busy.core_count())
    return summarise(name, weights, rate_per_s, len(prompts), seen, whole_s, shares.others + shares.stolen)


def warm_up(running: Running) -> None:
    """A few requests that do not count. Raises RequestError where even these fail."""

    async def ask() -> None:
        async with running.client() as client:
            prompt = list(_TOKEN_IDS[:PROMPT_TOKENS])
            await asyncio.gather(*(observe(client, prompt, ANSWER_TOKENS) for _ in range(WARM_UP_REQUESTS)))

    asyncio.run(ask())


async def _ask_all(
    running: Running, arrivals_s: Sequence[float], prompts: Sequence[Sequence[int]]
) -> list[Observation]:
    async with running.client() as client:
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        tasks = [
            asyncio.create_task(_ask_at(client, start_s + at_s, prompt))
            for at_s, prompt in zip(arrivals_s, prompts, strict=True)
        ]
        patience_s = start_s + (arrivals_s[-1] if arrivals_s else 0.0) + PATIENCE_S - loop.time()
        done, unfinished = await asyncio.wait(tasks, timeout=patience_s) if tasks else (set(), set())
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        return [seen for task in done if (seen := task.result()) is not None]


async def _ask_at(client: Client, at_s: float, prompt: Sequence[int]) -> Observation | None:
    """None if the server refused or broke off."""
    await asyncio.sleep(at_s - asyncio.get_running_loop().time())
    try:
        return await observe(client, prompt, ANSWER_TOKENS)
    except RequestError:
        return None
