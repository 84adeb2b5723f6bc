"""A prompt goes through real processes and sockets, and what comes back is what the two engines say."""

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from edgellm.engines.base import Batch, Engine
from edgellm.engines.kv import HostKvPool
from edgellm.engines.load import load_engine
from edgellm.orchestrator.local_cluster import LocalCluster
from edgellm.runtime.rpc import inference_pb2 as api

PROMPTS = ("Once upon a time", "Lily and Tom went to the park. They", "The big dog", "One day, a bird")


def story(text: str, max_tokens: int = 48, **fields: object) -> api.GenerateRequest:
    return api.GenerateRequest(text=text, max_tokens=max_tokens, ignore_eos=True, **fields)


def forward(engine: Engine, tokens: list[int], first_position: int, blocks: list[int]) -> int:
    """One sequence, one step; the greedy token after the last row."""
    batch = Batch(
        tokens=np.array(tokens, np.int32),
        hidden=None,
        row_starts=np.array([0, len(tokens)], np.int32),
        first_positions=np.array([first_position], np.int32),
        block_tables=np.array([blocks], np.int32),
        logit_rows=np.array([len(tokens) - 1], np.int32),
    )
    logits = engine.forward(batch).logits
    assert logits is not None
    return int(np.argmax(logits[0]))


def hybrid_greedy(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """The same two engines in this process: the prompt in half precision, then INT4 on its KV."""
    prefill = load_engine(bundle, "prefill-tp0of1", kv_blocks=16)
    assert isinstance(prefill.kv, HostKvPool)
    decode = load_engine(bundle, "decode-pp0of1", kv_blocks=16, pool=prefill.kv)
    blocks = [int(block) for block in prefill.kv.allocate(16)]
    tokens = [forward(prefill, prompt, 0, blocks)]
    while len(tokens) < count:
        tokens.append(forward(decode, tokens[-1:], len(prompt) + len(tokens) - 1, blocks))
    prefill.close()
    decode.close()
    return tokens


def test_the_cluster_answers_as_its_two_engines_do(
    cluster: LocalCluster, stories_bundle: Path, ask: Callable, everything_is_free: Callable
) -> None:
    prompt = [1, *range(3, 200, 3)]
    with cluster.client() as stub:
        request = api.GenerateRequest(token_ids=api.TokenIds(ids=prompt), max_tokens=64, ignore_eos=True)
        answer = ask(stub, request)
        assert list(answer.token_ids) == hybrid_greedy(stories_bundle, prompt, 64)
        assert answer.indices == tuple(range(64))
        assert answer.finished.reason == api.FINISH_REASON_LENGTH
        assert answer.finished.prefill_path == api.PREFILL_PATH_REMOTE
        assert answer.finished.kv.transport == "shm"
        assert answer.finished.kv.bytes > 0
        everything_is_free(stub)


def test_an_answer_does_not_depend_on_what_else_runs(
    cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    """Sampled at temperature 1, so that a single wrong bit would soon show."""
    sampling = api.SamplingParams(temperature=1.0, seed=7)
    with cluster.client() as stub, ThreadPoolExecutor(32) as threads:
        alone = ask(stub, story(PROMPTS[0], sampling=sampling))
        others = [threads.submit(ask, stub, story(PROMPTS[i % 4], 20 + 9 * i)) for i in range(16)]
        again = list(threads.map(lambda _: ask(stub, story(PROMPTS[0], sampling=sampling)), range(20)))
        assert all(len(other.result().token_ids) == 20 + 9 * i for i, other in enumerate(others))
        assert {answer.token_ids for answer in again} == {alone.token_ids}
        assert {answer.text for answer in again} == {alone.text}
        everything_is_free(stub)


def test_two_hundred_requests_of_which_many_leave_early(
    cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    chance = random.Random(5)
    plans = [(chance.choice(PROMPTS), chance.choice(("stay", "cancel", "disconnect"))) for _ in range(200)]

    def run(number: int) -> tuple[int, ...]:
        text, ending = plans[number]
        request = story(text, max_tokens=40, request_id=f"r{number}")
        if ending == "stay":
            return ask(stub, request).token_ids
        call = stub.Generate(request, timeout=120)
        for _ in range(number % 12):
            next(call, None)
        if ending == "cancel":
            stub.Cancel(api.CancelRequest(request_id=request.request_id), timeout=60)
        call.cancel()
        return ()

    with cluster.client() as stub, ThreadPoolExecutor(64) as threads:
        answers = list(threads.map(run, range(200)))
        for text in PROMPTS:
            stayed = {a for a, plan in zip(answers, plans, strict=True) if plan == (text, "stay")}
            assert len(stayed) == 1
            assert len(stayed.pop()) == 40
        everything_is_free(stub)


@pytest.mark.timeout(1200)
def test_a_chat_model_knows_the_capital_of_france(
    chat_cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    question = api.Chat(messages=[api.ChatMessage(role="user", content="What is the capital of France?")])
    request = api.GenerateRequest(chat=question, max_tokens=32)
    essay = api.Chat(messages=[api.ChatMessage(role="user", content="Write about the sea.")])
    with chat_cluster.client() as stub, ThreadPoolExecutor(20) as threads:
        first = ask(stub, request)
        assert "Paris" in first.text
        assert first.finished.prefill_path == api.PREFILL_PATH_REMOTE
        others = [
            threads.submit(ask, stub, api.GenerateRequest(chat=essay, max_tokens=60 + i, ignore_eos=True))
            for i in range(16)
        ]
        again = [threads.submit(ask, stub, request) for _ in range(20)]
        assert {answer.result().token_ids for answer in again} == {first.token_ids}
        assert [len(other.result().token_ids) for other in others] == [60 + i for i in range(16)]
        everything_is_free(stub)


@pytest.mark.soak
def test_five_minutes_of_arrivals_departures_and_long_answers(
    cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    expected: dict[tuple[str, int], tuple[int, ...]] = {}
    end_s = time.monotonic() + 300

    def keep_asking(worker: int) -> int:
        chance, asked = random.Random(worker), 0
        while time.monotonic() < end_s:
            key = (chance.choice(PROMPTS), chance.randrange(1, 200))
            if chance.random() < 0.3:
                call = stub.Generate(story(*key), timeout=120)
                next(call, None)
                call.cancel()
            else:
                token_ids = ask(stub, story(*key)).token_ids
                assert expected.setdefault(key, token_ids) == token_ids
            asked += 1
        return asked

    with cluster.client() as stub, ThreadPoolExecutor(24) as threads:
        assert sum(threads.map(keep_asking, range(24))) > 24
        everything_is_free(stub)
