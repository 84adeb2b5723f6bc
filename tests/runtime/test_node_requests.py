"""Real node servers, commanded over a real Join stream: whole requests, however their KV gets to the decoder."""

import asyncio

import numpy as np
import pytest

from edgellm.runtime.rpc import cluster_pb2, inference_pb2
from tests.runtime.conftest import (
    answer,
    attempt,
    cluster,
    decode,
    eventually,
    generation,
    one_by_one,
    prefill,
    random_prompt,
    target,
)


@pytest.mark.parametrize("allow_shm", [True, False])
@pytest.mark.parametrize("prompt_tokens", [1, 32, 150])
def test_remote_prefill_gives_the_tokens_of_one_engine(allow_shm, prompt_tokens):
    async def test(_, reader, writer):
        prompt = random_prompt(prompt_tokens)
        assert await answer(reader, writer, "r", prompt, generation(12)) == one_by_one(prompt, 12)
        [sent] = await reader.joined.wait_for("KvSent", "r")
        assert sent.transfer.transport == ("shm" if allow_shm else "grpc")
        assert sent.transfer.codec == "raw"
        assert sent.transfer.bytes == prompt_tokens * reader.joined.hello.kv_bytes_per_token
        assert 1 <= sent.transfer.chunks <= -(-prompt_tokens // 64)
        await reader.joined.wait_for("Released", "r")
        assert reader.server.ledger.attempts() == []

    cluster(test, allow_shm=allow_shm)


@pytest.mark.parametrize("degraded", [False, True])
def test_local_prefill_gives_the_tokens_of_one_engine(degraded):
    async def test(_, __, writer):
        prompt = random_prompt(100)
        assert await answer(writer, writer, "r", prompt, generation(12), degraded=degraded) == one_by_one(prompt, 12)

    cluster(test)


def test_known_tokens_are_replayed_and_not_sampled_again():
    async def test(_, reader, writer):
        prompt, expected = random_prompt(70), one_by_one(random_prompt(70), 20)
        for request_id, source in (("remote", reader), ("local", writer)):
            targets = [target(writer)] if source is reader else []
            wish, known = generation(20), expected[:13]
            source.joined.send(prefill=prefill(request_id, prompt, wish, epoch=3, targets=targets, generated=known))
            [done] = await source.joined.wait_for("PrefillDone", request_id)
            assert not done.HasField("first_token")
            writer.joined.send(decode=decode(request_id, prompt, wish, known, epoch=3))
            rest = await writer.joined.wait_for("AttemptToken", request_id, 7)
            assert [one.token.index for one in rest] == list(range(13, 20))
            assert [one.token.token_id for one in rest] == expected[13:]
            assert rest[-1].token.finish_reason == inference_pb2.FINISH_REASON_LENGTH

    cluster(test)


def test_decode_may_arrive_before_the_kv():
    async def test(_, reader, writer):
        prompt, expected = random_prompt(200), one_by_one(random_prompt(200), 6)
        writer.joined.send(decode=decode("r", prompt, generation(6), expected[:1]))
        await eventually(lambda: writer.joined.heartbeat.waiting == 1)
        reader.joined.send(prefill=prefill("r", prompt, generation(6), targets=[target(writer)]))
        rest = await writer.joined.wait_for("AttemptToken", "r", 5)
        assert [one.token.token_id for one in rest] == expected[1:]

    cluster(test)


def test_a_stop_token_ends_the_answer_wherever_it_is_sampled():
    async def test(_, reader, writer):
        prompt, expected = random_prompt(40), one_by_one(random_prompt(40), 9)
        for request_id, stop in (("first", expected[0]), ("later", expected[4])):
            wish = generation(9)
            wish.stop_token_ids.append(stop)
            reader.joined.send(prefill=prefill(request_id, prompt, wish, targets=[target(writer)]))
            [done] = await reader.joined.wait_for("PrefillDone", request_id)
            last = done.first_token
            if request_id == "later":
                writer.joined.send(decode=decode(request_id, prompt, wish, [last.token_id]))
                at = expected.index(stop)
                last = (await writer.joined.wait_for("AttemptToken", request_id, at))[-1].token
            assert (last.token_id, last.finish_reason) == (stop, inference_pb2.FINISH_REASON_STOP)
            # The writer may have received all of the KV before the answer ended at its first token.
            writer.joined.send(release=cluster_pb2.Release(attempt=attempt(request_id)))
            await writer.joined.wait_for("Released", request_id)
            await eventually(lambda: reader.joined.heartbeat.kv_blocks_free == 64)
            await eventually(lambda: writer.joined.heartbeat.kv_blocks_free == 64)

    cluster(test)


def test_logprobs_are_sent_where_asked_for():
    async def test(_, __, writer):
        prompt = random_prompt(20)
        for wanted in (False, True):
            wish, request_id = generation(3), str(wanted)
            wish.logprobs = wanted
            await answer(writer, writer, request_id, prompt, wish)
            [done] = await writer.joined.wait_for("PrefillDone", request_id)
            rest = await writer.joined.wait_for("AttemptToken", request_id, 2)
            for token in (done.first_token, *(one.token for one in rest)):
                assert token.HasField("logprob") == wanted
                assert -20 < token.logprob < 0 or not wanted

    cluster(test)


def test_requests_together_answer_like_requests_alone():
    async def test(_, reader, writer):
        rng = np.random.default_rng(9)
        prompts = [random_prompt(int(rng.integers(1, 120)), seed) for seed in range(12)]
        expected = [one_by_one(prompt, 8) for prompt in prompts]
        answers = await asyncio.gather(
            *(
                answer(reader if number % 3 else writer, writer, f"r{number}", prompt, generation(8))
                for number, prompt in enumerate(prompts)
            )
        )
        assert answers == expected

    cluster(test)


def test_answers_go_on_while_a_long_prompt_is_read_on_the_same_node():
    async def test(_, __, writer):
        running = asyncio.create_task(answer(writer, writer, "short", random_prompt(5), generation(100)))
        await writer.joined.wait_for("AttemptToken", "short")
        before = len(await writer.joined.wait_for("AttemptToken", "short"))
        writer.joined.send(prefill=prefill("long", random_prompt(370), generation(4)))
        await writer.joined.wait_for("PrefillDone", "long")
        during = len(await writer.joined.wait_for("AttemptToken", "short")) - before
        # The prompt takes 6 steps of 64 rows, and a decode step runs after each.
        assert 5 <= during < 100 - before
        assert len(await running) == 100
        writer.joined.send(release=cluster_pb2.Release(attempt=attempt("long")))
        await writer.joined.wait_for("Released", "long")

    cluster(test)


def test_int8_on_the_wire_still_answers():
    async def test(_, reader, writer):
        prompt = random_prompt(100)
        assert len(await answer(reader, writer, "r", prompt, generation(5))) == 5
        [sent] = await reader.joined.wait_for("KvSent", "r")
        assert sent.transfer.codec == "int8+zstd"

    cluster(test, kv_codec="int8+zstd")
