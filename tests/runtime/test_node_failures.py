"""Whatever is released, refused, lost or killed: it is answered, and every block is free again."""

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from edgellm.runtime.config import NodeError
from edgellm.runtime.kv.servicer import ExchangeConfig
from edgellm.runtime.rpc import cluster_pb2
from tests.runtime.conftest import (
    CONTRACT,
    MAX_SEQ_LEN,
    VOCAB,
    Running,
    answer,
    attempt,
    cluster,
    decode,
    eventually,
    generation,
    node,
    node_server,
    one_by_one,
    orchestrating,
    prefill,
    random_prompt,
    target,
)


def release(request_id: str, epoch: int = 0) -> cluster_pb2.Release:
    return cluster_pb2.Release(attempt=attempt(request_id, epoch))


def all_free(*nodes: Running) -> bool:
    return all(one.server.ledger.pool.free_blocks == one.server.ledger.pool.num_blocks for one in nodes)


def slowed(forward, seconds=0.1):
    """The same engine, taking its time."""

    def slow_forward(batch):
        time.sleep(seconds)
        return forward(batch)

    return slow_forward


async def failure(running: Running, request_id: str) -> cluster_pb2.RequestFailed:
    [failed] = await running.joined.wait_for("RequestFailed", request_id)
    return failed


@pytest.mark.parametrize("stage", ["queued", "reading", "sending", "sent", "decoding", "finished", "unknown"])
def test_release_frees_a_request_at_every_stage(stage):
    async def test(_, reader, writer):
        prompt, wish = random_prompt(200), generation(100)
        if stage == "queued":
            reader.joined.send(prefill=prefill("before", random_prompt(380), generation(4), targets=[target(writer)]))
        if stage != "unknown":
            reader.joined.send(prefill=prefill("r", prompt, wish, targets=[target(writer)]))
        if stage == "reading":
            await eventually(lambda: reader.server.node.running == 1)
        if stage in ("sending", "sent", "decoding", "finished"):
            [done] = await reader.joined.wait_for("PrefillDone", "r")
        if stage in ("sent", "decoding", "finished"):
            await reader.joined.wait_for("KvSent", "r")
        if stage in ("decoding", "finished"):
            writer.joined.send(decode=decode("r", prompt, wish, [done.first_token.token_id]))
            await writer.joined.wait_for("AttemptToken", "r", 99 if stage == "finished" else 3)
        for one in (reader, writer):
            one.joined.send(release=release("r"))
        for one in (reader, writer):
            await one.joined.wait_for("Released", "r")
        if stage == "queued":
            await reader.joined.wait_for("KvSent", "before")
            for one in (reader, writer):
                one.joined.send(release=release("before"))
                await one.joined.wait_for("Released", "before")
        await eventually(lambda: all_free(reader, writer))
        # The fence stays: the same epoch is ignored, the next one runs.
        reader.joined.send(prefill=prefill("r", prompt, generation(3), targets=[target(writer)]))
        reader.joined.send(prefill=prefill("r", prompt, generation(3), epoch=1, targets=[target(writer)]))
        await eventually(lambda: any(a.epoch == 1 for a in writer.server.ledger.attempts()))
        writer.joined.send(decode=decode("r", prompt, generation(3), one_by_one(prompt, 1), epoch=1))
        await eventually(lambda: all_free(reader, writer))

    cluster(test)


def test_random_cancellations_leave_all_blocks_free():
    async def run_and_cancel(reader, writer, request_id, chance) -> None:
        prompt, wish = (
            random_prompt(chance.randrange(1, 150), chance.randrange(1000)),
            generation(chance.randrange(1, 30)),
        )
        running = asyncio.create_task(answer(reader, writer, request_id, prompt, wish))
        done, _ = await asyncio.wait([running], timeout=chance.random() * 0.4)
        if not done:
            running.cancel()
        for one in {id(reader): reader, id(writer): writer}.values():
            one.joined.send(release=release(request_id))
            await one.joined.wait_for("Released", request_id)
        if done:
            assert await running == one_by_one(prompt, wish.max_tokens)

    async def test(_, reader, writer):
        chance = random.Random(4)
        for round_number in range(4):
            async with asyncio.TaskGroup() as tasks:
                for number in range(15):
                    source = writer if number % 4 == 0 else reader
                    tasks.create_task(run_and_cancel(source, writer, f"{round_number}.{number}", chance))
            await eventually(lambda: all_free(reader, writer))
        reader.server.ledger.check_integrity()
        writer.server.ledger.check_integrity()

    cluster(test)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "sampling", "says"),
    [
        ([], 4, {}, "0 prompt tokens"),
        ([1], 0, {}, "at most 0"),
        ([VOCAB], 4, {}, "outside of the vocabulary"),
        ([2**32 - 1], 4, {}, "outside of the vocabulary"),
        ([1] * MAX_SEQ_LEN, 1, {}, "exceed"),
        ([1], 4, {"temperature": float("nan")}, "temperature"),
        ([1], 4, {"top_p": 0.0, "temperature": 1.0}, "top_p"),
    ],
)
def test_wrong_requests_are_refused_with_the_reason(prompt, max_tokens, sampling, says):
    async def test(_, reader, writer):
        wish = generation(max_tokens, **sampling)
        reader.joined.send(prefill=prefill("r", prompt, wish, targets=[target(writer)]))
        writer.joined.send(decode=decode("r", prompt, wish, [1]))
        for one in (reader, writer):
            failed = await failure(one, "r")
            assert failed.kind == cluster_pb2.FAILURE_KIND_REQUEST
            assert says in failed.message
        await eventually(lambda: all_free(reader, writer))

    cluster(test)


def test_work_for_an_engine_that_a_node_does_not_have_is_refused():
    async def test(_, reader, writer):
        reader.joined.send(prefill=prefill("r", [1, 2], generation(4), degraded=True))
        reader.joined.send(decode=decode("s", [1, 2], generation(4), [1]))
        for request_id in ("r", "s"):
            assert (await failure(reader, request_id)).kind == cluster_pb2.FAILURE_KIND_ENGINE

    cluster(test)


def test_a_request_larger_than_the_pool_is_refused_and_others_wait_for_room():
    async def test(_, reader, writer):
        reader.joined.send(prefill=prefill("large", random_prompt(129), generation(2), targets=[target(writer)]))
        assert (await failure(reader, "large")).kind == cluster_pb2.FAILURE_KIND_CAPACITY
        prompts = [random_prompt(100, seed) for seed in range(5)]
        answers = await asyncio.gather(
            *(answer(reader, writer, f"r{n}", prompt, generation(4)) for n, prompt in enumerate(prompts))
        )
        assert answers == [one_by_one(prompt, 4) for prompt in prompts]

    cluster(test, blocks=4)


def test_a_full_receiver_is_named():
    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reader = await stack.enter_async_context(node(orchestrator, "reader", "prefill"))
            writer = await stack.enter_async_context(node(orchestrator, "writer", "decode", blocks=3))
            reader.joined.send(prefill=prefill("r", random_prompt(90), generation(40), targets=[target(writer)]))
            failed = await failure(reader, "r")
            assert (failed.kind, failed.peer_node_id) == (cluster_pb2.FAILURE_KIND_CAPACITY, "writer")
            await eventually(lambda: all_free(reader, writer))

    asyncio.run(run())


def test_kv_that_never_comes_fails_in_bounded_time():
    async def test(_, __, writer):
        writer.joined.send(decode=decode("r", [1, 2, 3], generation(4), [1], timeout_ms=60))
        failed = await failure(writer, "r")
        assert failed.kind == cluster_pb2.FAILURE_KIND_TRANSFER
        assert "0.06 s" in failed.message

    cluster(test)


def test_a_receiver_that_is_gone_is_named():
    async def test(_, reader, writer):
        gone = target(writer)
        writer.server.stop()
        await asyncio.gather(writer.task, return_exceptions=True)
        reader.joined.send(prefill=prefill("r", random_prompt(90), generation(4), targets=[gone]))
        failed = await failure(reader, "r")
        assert (failed.kind, failed.peer_node_id) == (cluster_pb2.FAILURE_KIND_TRANSFER, "writer")
        await eventually(lambda: all_free(reader))

    cluster(test)


def test_a_restarted_receiver_is_shaken_hands_with_again():
    async def run() -> None:
        async with orchestrating() as orchestrator, node(orchestrator, "reader", "prefill") as reader:
            address = "127.0.0.1:0"
            for life in range(2):
                async with node(orchestrator, "writer", "decode", listen=address) as writer:
                    address = writer.joined.hello.exchange_address
                    prompt = random_prompt(60, life)
                    assert await answer(reader, writer, f"r{life}", prompt, generation(4)) == one_by_one(prompt, 4)
                del orchestrator.nodes["writer"]

    asyncio.run(run())


@pytest.mark.parametrize("claimed", [True, False])
def test_a_sender_that_dies_midway_frees_the_receiver_and_fails_the_answer(claimed):
    async def test(_, reader, writer):
        prompt, engine = random_prompt(370), reader.server.node.lanes.half.engine
        engine.forward = slowed(engine.forward)
        reader.joined.send(prefill=prefill("r", prompt, generation(10), targets=[target(writer)]))
        await eventually(lambda: not all_free(writer))
        if claimed:
            writer.joined.send(decode=decode("r", prompt, generation(10), [1]))
            await eventually(lambda: writer.server.node.waiting == 1)
        reader.server.stop()
        await eventually(lambda: all_free(writer))
        if not claimed:
            writer.joined.send(decode=decode("r", prompt, generation(10), [1], timeout_ms=60_000))
        assert (await failure(writer, "r")).kind == cluster_pb2.FAILURE_KIND_TRANSFER

    cluster(test)


def test_another_contract_is_refused_naming_both():
    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reader = await stack.enter_async_context(node(orchestrator, "reader", "prefill"))
            other = replace(CONTRACT, head_dim=16)
            writer = await stack.enter_async_context(node(orchestrator, "writer", "decode", contract=other))
            reader.joined.send(prefill=prefill("r", random_prompt(9), generation(4), targets=[target(writer)]))
            failed = await failure(reader, "r")
            assert failed.kind == cluster_pb2.FAILURE_KIND_TRANSFER
            assert CONTRACT.sha256[:12] in failed.message
            assert other.sha256[:12] in failed.message

    asyncio.run(run())


def test_a_silent_sender_is_given_up():
    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reader = await stack.enter_async_context(node(orchestrator, "reader", "prefill"))
            impatient = ExchangeConfig(idle_timeout_s=0.05)
            writer = await stack.enter_async_context(node(orchestrator, "writer", "decode", exchange=impatient))
            engine = reader.server.node.lanes.half.engine
            engine.forward = slowed(engine.forward, 0.5)
            reader.joined.send(prefill=prefill("r", random_prompt(9), generation(4), targets=[target(writer)]))
            failed = await failure(reader, "r")
            assert "silent" in failed.message
            await eventually(lambda: all_free(writer))

    asyncio.run(run())


def test_a_newer_epoch_takes_the_place_of_an_older_one():
    async def test(_, __, writer):
        writer.joined.send(prefill=prefill("r", random_prompt(300), generation(50)))
        await eventually(lambda: writer.server.node.running == 1)
        prompt = random_prompt(40, 1)
        writer.joined.send(prefill=prefill("r", prompt, generation(5), epoch=1))
        [done] = await writer.joined.wait_for("PrefillDone", "r")
        assert done.attempt.epoch == 1
        writer.joined.send(decode=decode("r", prompt, generation(5), [done.first_token.token_id], epoch=1))
        rest = await writer.joined.wait_for("AttemptToken", "r", 4)
        tokens = [done.first_token.token_id, *(one.token.token_id for one in rest)]
        assert tokens == one_by_one(prompt, 5)
        await eventually(lambda: all_free(writer))

    cluster(test)


def test_an_engine_that_breaks_ends_the_node():
    async def test(_, __, writer):
        def explode(batch):
            raise MemoryError("no more")

        writer.server.node.lanes.half.engine.forward = explode
        writer.joined.send(prefill=prefill("r", [1, 2], generation(4)))
        with pytest.raises(MemoryError, match="no more"):
            await writer.task

    cluster(test)


def test_an_engine_that_refuses_fails_the_requests_of_the_step():
    async def test(_, __, writer):
        def refuse(batch):
            raise ValueError("not today")

        writer.server.node.lanes.half.engine.forward = refuse
        writer.joined.send(prefill=prefill("r", [1, 2], generation(4)))
        failed = await failure(writer, "r")
        assert failed.kind == cluster_pb2.FAILURE_KIND_ENGINE
        assert "not today" in failed.message
        await eventually(lambda: all_free(writer))

    cluster(test)


def test_a_node_rejoins_without_what_is_of_no_use_to_another_orchestrator():
    async def run() -> None:
        async with AsyncExitStack() as stack:
            first = await stack.enter_async_context(orchestrating())
            async with AsyncExitStack() as inner:
                writer = await inner.enter_async_context(node(first, "writer", "decode"))
                writer.joined.send(prefill=prefill("r", random_prompt(300), generation(50)))
                await eventually(lambda: writer.server.node.running == 1)
                await first.server.stop(grace=None)
                second = await stack.enter_async_context(orchestrating(first.address))
                joined = await second.node("writer")
                await eventually(lambda: all_free(writer))
                again = Running(server=writer.server, joined=joined, task=writer.task)
                prompt = random_prompt(20)
                assert await answer(again, again, "r", prompt, generation(3)) == one_by_one(prompt, 3)

    asyncio.run(run())


def test_a_node_gives_up_when_its_orchestrator_stays_away():
    async def run() -> None:
        async with orchestrating() as orchestrator, node(orchestrator, "writer", "decode", lease_s=0.3) as writer:
            await orchestrator.server.stop(grace=None)
            with pytest.raises(NodeError, match="no orchestrator"):
                await writer.task

    asyncio.run(run())


def test_shutdown_ends_the_node():
    async def test(_, __, writer):
        writer.joined.send(prefill=prefill("r", random_prompt(300), generation(50)))
        writer.joined.send(shutdown=cluster_pb2.Shutdown())
        await asyncio.wait_for(writer.task, 10)

    cluster(test)


def test_a_node_whose_parent_ended_before_it_was_ready_ends():
    async def run() -> None:
        server = node_server("127.0.0.1:1", "n", "decode", parent_pid=2**22 + 1)
        with pytest.raises(NodeError, match="has ended"):
            await asyncio.wait_for(server.run(), 4)

    asyncio.run(run())
