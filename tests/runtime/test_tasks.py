"""Structured waiting: who ends first, who is cancelled, and which error is seen."""

import asyncio

import pytest

from edgellm.runtime.tasks import race, run_all


class Recorder:
    def __init__(self) -> None:
        self.cancelled = 0

    async def forever(self) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


async def fail(message: str) -> None:
    await asyncio.sleep(0)
    raise KeyError(message)


async def soon() -> None:
    await asyncio.sleep(0)


def test_race_cancels_the_losers_and_raises_what_the_first_raised():
    recorder = Recorder()
    asyncio.run(race(recorder.forever(), soon(), recorder.forever()))
    with pytest.raises(KeyError, match="why"):
        asyncio.run(race(recorder.forever(), fail("why")))
    assert recorder.cancelled == 3


def test_run_all_waits_for_all_unless_one_fails():
    recorder = Recorder()
    asyncio.run(run_all(soon(), soon()))
    with pytest.raises(KeyError, match="why"):
        asyncio.run(run_all(recorder.forever(), soon(), fail("why")))
    assert recorder.cancelled == 1


@pytest.mark.parametrize("wait", [race, run_all])
def test_cancelling_the_waiter_cancels_all(wait):
    async def run() -> int:
        recorder = Recorder()
        waiting = asyncio.create_task(wait(recorder.forever(), recorder.forever()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return recorder.cancelled

    assert asyncio.run(run()) == 2
