"""The batchers finish every request, keep every limit, and do not change a token."""

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engines.sampling import SamplingParams
from edgellm.engines.spec import EngineLimits
from edgellm.runtime.batching.decode import Continuation, DecodeBatcher
from edgellm.runtime.batching.prefill import PrefillBatcher, Prompt
from edgellm.runtime.batching.steps import Sampled, Step
from edgellm.runtime.engine_loop import run_step
from edgellm.runtime.generation import Generation
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, RequestId
from tests.runtime.conftest import VOCAB, one_by_one, tiny_engine, tiny_pool

GREEDY = SamplingParams(seed=0)


def attempt(number: int) -> Attempt:
    return Attempt(request_id=RequestId(f"r{number}"), epoch=0)


def generation(max_tokens: int, stop: frozenset[int] = frozenset()) -> Generation:
    return Generation(sampling=GREEDY, max_tokens=max_tokens, stop_token_ids=stop)


def make_limits(max_rows: int, max_sequences: int) -> EngineLimits:
    return EngineLimits(max_rows=max_rows, max_sequences=max_sequences, max_seq_len=1 << 20)


def check_step(step: Step, limits: EngineLimits) -> None:
    assert 0 < step.rows <= limits.max_rows
    assert 0 < len(step.segments) <= limits.max_sequences
    assert len(set(step.attempts)) == len(step.segments)
    assert [len(s.tokens) for s in step.segments] == np.diff(step.batch.row_starts).tolist()
    ends = [int(e) - 1 for e, s in zip(step.batch.row_starts[1:], step.segments, strict=True) if s.sample]
    assert step.batch.logit_rows.tolist() == ends


limits = st.builds(make_limits, st.integers(1, 40), st.integers(1, 6))


@dataclass(frozen=True)
class Arrival:
    at_step: int
    tokens: int
    removed_after_steps: int | None

    def is_removed_at(self, step_number: int) -> bool:
        return self.removed_after_steps is not None and step_number == self.at_step + self.removed_after_steps


arrivals = st.lists(
    st.builds(Arrival, st.integers(0, 12), st.integers(1, 90), st.none() | st.integers(0, 10)), min_size=1, max_size=12
)


@given(arrivals, limits, st.integers(1, 100), st.integers(1, 64))
def test_prefill_reads_every_token_of_every_prompt_once(arriving, limits, max_batch_tokens, chunk_rows):
    batcher = PrefillBatcher(limits, max_batch_tokens=max_batch_tokens, chunk_rows=chunk_rows)
    read = dict.fromkeys(range(len(arriving)), 0)
    finished: set[int] = set()
    removed: set[int] = set()
    for step_number in range(2000):
        for number, arrival in enumerate(arriving):
            if arrival.at_step == step_number:
                tokens = np.arange(arrival.tokens, dtype=np.int32)
                blocks = np.arange(3, dtype=np.int32)
                batcher.add(Prompt(attempt=attempt(number), tokens=tokens, blocks=blocks, generation=generation(4)))
        step = batcher.plan()
        for number, arrival in enumerate(arriving):
            if arrival.is_removed_at(step_number):
                batcher.remove(attempt(number))
                removed.add(number)
        if step is None:
            if step_number > 22:
                break
            continue
        check_step(step, limits)
        assert step.rows <= chunk_rows
        progressed = batcher.commit(step, [Sampled(token_id=1, logprob=-1.0)] * len(step.samples))
        for segment in step.segments:
            number = int(segment.attempt.request_id[1:])
            assert segment.tokens.tolist() == list(range(read[number], read[number] + len(segment.tokens)))
            assert segment.first_position == read[number]
            read[number] += len(segment.tokens)
        for progress in progressed:
            number = int(progress.attempt.request_id[1:])
            assert number not in removed
            assert progress.computed == read[number]
            assert progress.finished == (read[number] == arriving[number].tokens)
            assert (progress.first_token is not None) == progress.finished
            if progress.finished:
                finished.add(number)
    never_removed = {number for number, arrival in enumerate(arriving) if number not in removed}
    assert never_removed <= finished
    assert batcher.running == batcher.waiting == 0


@given(limits, st.lists(st.tuples(st.integers(1, 200), st.integers(1, 6)), min_size=1, max_size=8))
def test_prefill_batches_keep_to_their_tokens_unless_one_prompt_is_longer(limits, sizes):
    batcher = PrefillBatcher(limits, max_batch_tokens=100, chunk_rows=limits.max_rows)
    for number, (tokens, _) in enumerate(sizes):
        prompt = np.zeros(tokens, np.int32)
        batcher.add(Prompt(attempt=attempt(number), tokens=prompt, blocks=prompt[:1], generation=None))
    order = []
    while (step := batcher.plan()) is not None:
        order += [s.attempt for s in step.segments if s.attempt not in order]
        batcher.commit(step, [])
    assert order == [attempt(number) for number in range(len(sizes))]


@dataclass(frozen=True)
class Answer:
    at_step: int
    prompt: int
    known: int
    to_generate: int
    removed_after_steps: int | None

    def is_removed_at(self, step_number: int) -> bool:
        return self.removed_after_steps is not None and step_number == self.at_step + self.removed_after_steps


answers = st.lists(
    st.builds(
        Answer, st.integers(0, 8), st.integers(1, 40), st.integers(1, 60), st.integers(1, 12),
        st.none() | st.integers(0, 15),
    ),
    min_size=1, max_size=10,
)  # fmt: skip


@given(answers, limits)
def test_decode_computes_each_position_once_and_numbers_tokens_without_gaps(answers, limits):
    batcher = DecodeBatcher(limits)
    next_position: dict[int, int] = {}
    indices: dict[int, list[int]] = {number: [] for number in range(len(answers))}
    done: set[int] = set()
    for step_number in range(4000):
        for number, answer in enumerate(answers):
            if answer.at_step == step_number:
                next_position[number] = answer.prompt
                batcher.add(
                    Continuation(
                        attempt=attempt(number),
                        prompt=np.zeros(answer.prompt, np.int32),
                        generated=np.arange(answer.known, dtype=np.int32),
                        blocks=np.arange(4, dtype=np.int32),
                        generation=generation(answer.known + answer.to_generate),
                    )
                )
        step = batcher.plan()
        for number, answer in enumerate(answers):
            if answer.is_removed_at(step_number):
                batcher.remove(attempt(number))
                done.add(number)
        if step is None:
            if step_number > 23:
                break
            continue
        check_step(step, limits)
        for segment in step.segments:
            number = int(segment.attempt.request_id[1:])
            assert segment.first_position == next_position[number]
            next_position[number] += len(segment.tokens)
        for one in batcher.commit(step, [Sampled(token_id=7, logprob=0.0)] * len(step.samples)):
            number = int(one.attempt.request_id[1:])
            assert number not in done
            indices[number].append(one.token.index)
            if one.token.finish is not None:
                assert one.token.finish == "length"
                done.add(number)
    assert done == set(range(len(answers)))
    assert batcher.running == 0
    for number, answer in enumerate(answers):
        first = answer.known
        assert indices[number] == list(range(first, first + len(indices[number])))
        if answer.removed_after_steps is None:
            assert len(indices[number]) == answer.to_generate


def test_a_stop_token_is_emitted_and_ends_the_answer():
    batcher = DecodeBatcher(make_limits(8, 8))
    tokens = np.zeros(3, np.int32)
    batcher.add(
        Continuation(
            attempt=attempt(0),
            prompt=tokens,
            generated=tokens[:1],
            blocks=tokens,
            generation=generation(9, frozenset({5})),
        )
    )
    step = batcher.plan()
    assert step is not None
    [one] = batcher.commit(step, [Sampled(token_id=5, logprob=-0.5)])
    assert (one.token.token_id, one.token.index, one.token.finish) == (5, 1, "stop")
    assert batcher.plan() is None


def test_catching_up_does_not_starve_and_is_not_starved():
    batcher = DecodeBatcher(make_limits(4, 2))
    for number in range(5):
        known = np.arange(1 if number else 200, dtype=np.int32)
        batcher.add(
            Continuation(
                attempt=attempt(number), prompt=known[:1], generated=known, blocks=known, generation=generation(1000)
            )
        )
    served = dict.fromkeys(range(5), 0)
    for _ in range(50):
        step = batcher.plan()
        assert step is not None
        for segment in step.segments:
            served[int(segment.attempt.request_id[1:])] += 1
        batcher.commit(step, [Sampled(token_id=1, logprob=0.0)] * len(step.samples))
    assert set(served.values()) == {20}


def add_answers(batcher: DecodeBatcher, numbers: range) -> None:
    for number in numbers:
        one = np.zeros(1, np.int32)
        batcher.add(
            Continuation(attempt=attempt(number), prompt=one, generated=one, blocks=one, generation=generation(100))
        )


def numbers_of(step: Step | None) -> list[int]:
    assert step is not None
    return [int(segment.attempt.request_id[1:]) for segment in step.segments]


def commit(batcher: DecodeBatcher, step: Step | None) -> None:
    assert step is not None
    batcher.commit(step, [Sampled(token_id=1, logprob=0.0)] * len(step.samples))


def test_micro_batches_share_the_sequences_and_no_sequence_is_in_two():
    batcher = DecodeBatcher(make_limits(8, 8), depth=2)
    add_answers(batcher, range(5))
    first, second = batcher.plan(), batcher.plan()
    assert (numbers_of(first), numbers_of(second)) == ([0, 1, 2], [3, 4])
    assert batcher.plan() is None
    commit(batcher, second)
    third = batcher.plan()
    assert numbers_of(third) == [3, 4]
    commit(batcher, first)
    assert (numbers_of(batcher.plan()), batcher.steps_under_way) == ([0, 1, 2], 2)
    for number in range(3):
        batcher.remove(attempt(number))
    assert batcher.steps_under_way == 1


def test_a_sequence_that_waits_for_kv_at_another_node_holds_up_no_other():
    batcher = DecodeBatcher(make_limits(8, 8), is_followed=True)
    add_answers(batcher, range(2))
    commit(batcher, batcher.plan())
    add_answers(batcher, range(2, 4))
    settled, new = batcher.plan(), batcher.plan()
    assert (numbers_of(settled), numbers_of(new)) == ([0, 1], [2, 3])
    for _ in range(3):
        commit(batcher, settled)
        settled = batcher.plan()
        assert numbers_of(settled) == [0, 1]
    commit(batcher, new)
    commit(batcher, settled)
    assert sorted(numbers_of(batcher.plan())) == [0, 1, 2, 3]


@settings(max_examples=15)
@given(st.data())
def test_batched_answers_equal_answers_alone(data):
    """Prompts of random sizes through both batchers, together and with catch-up, against one request at a time."""
    pool = tiny_pool(64)
    ledger = BlockLedger(pool)
    engine = tiny_engine(
        "decode", pool, max_rows=data.draw(st.integers(3, 64)), max_sequences=data.draw(st.integers(1, 5))
    )
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    count, max_tokens = data.draw(st.integers(1, 4)), 10
    prompts = [rng.integers(0, VOCAB, rng.integers(1, 80)).astype(np.int32) for _ in range(count)]
    expected = [one_by_one(prompt, max_tokens) for prompt in prompts]
    reader = PrefillBatcher(engine.spec.limits, max_batch_tokens=128, chunk_rows=data.draw(st.integers(1, 64)))
    writer = DecodeBatcher(engine.spec.limits)
    answers: dict[Attempt, list[int]] = {}
    for number, prompt in enumerate(prompts):
        blocks = np.array(ledger.reserve(attempt(number), len(prompt) + max_tokens), np.int32)
        reader.add(Prompt(attempt=attempt(number), tokens=prompt, blocks=blocks, generation=generation(max_tokens)))
    while (step := reader.plan()) is not None:
        for progress in reader.commit(step, run_step(engine, step).sampled):
            if progress.first_token is not None:
                answers[progress.attempt] = [progress.first_token.token_id]
    for number, prompt in enumerate(prompts):
        known = expected[number][: data.draw(st.integers(1, max_tokens - 1))]
        assert answers[attempt(number)] == known[:1]
        answers[attempt(number)] = list(known)
        writer.add(
            Continuation(
                attempt=attempt(number),
                prompt=prompt,
                generated=np.array(known, np.int32),
                blocks=np.array(ledger.blocks(attempt(number)), np.int32),
                generation=generation(max_tokens),
            )
        )
    while (step := writer.plan()) is not None:
        for one in writer.commit(step, run_step(engine, step).sampled):
            answers[one.attempt].append(one.token.token_id)
    assert [answers[attempt(number)] for number in range(count)] == expected
