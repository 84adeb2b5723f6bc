"""The native sampler is its NumPy twin, and both draw from the distribution that the parameters describe."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.engines.sampling import SamplingError, SamplingParams, sample, sample_reference
from edgellm.engines.sampling_reference import WEIGHT_ONE, weights

FloatArray = npt.NDArray[np.float32]
EMPTY = np.zeros(0, np.int32)


def tokens_of(logits: Sequence[float] | FloatArray, count: int = 1, history: Any = EMPTY, **fields: Any) -> list[int]:
    """`count` draws from one row, at indices 0, 1, 2 and up."""
    rows = np.tile(np.array(logits, np.float32), (count, 1))
    params = SamplingParams(**{"seed": 1, "temperature": 1.0} | fields)
    tokens, _ = sample(rows, [params] * count, [np.array(history, np.int32)] * count, range(count))
    return [int(token) for token in tokens]


@st.composite
def cases(draw: st.DrawFn) -> tuple[FloatArray, SamplingParams, npt.NDArray[np.int32], int]:
    vocab = draw(st.sampled_from([1, 2, 3, 15, 16, 17, 100, 1000, 4099]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.normal(size=vocab).astype(np.float32) * np.float32(draw(st.sampled_from([0, 0.01, 1, 5, 50, 1e37])))
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[rng.random(vocab) < 0.3] = -np.inf
        logits[rng.integers(vocab)] = 1.0
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.001, 0.3, 1.0, 1.7, 100.0])),
        top_k=draw(st.sampled_from([0, 1, 2, 10, vocab - 1, vocab, 10**9])),
        top_p=draw(st.sampled_from([1.0, 0.999999, 0.95, 0.5, 1e-9])),
        min_p=draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2, 0.5])),
        logit_bias={int(t): float(rng.normal() * 5) for t in rng.integers(0, vocab, draw(st.integers(0, 3)))},
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return (
        logits,
        params,
        rng.integers(0, vocab, draw(st.integers(0, 30))).astype(np.int32),
        draw(st.integers(0, 2**40)),
    )


@settings(deadline=None)
@given(cases())
def test_native_equals_twin(case: tuple[FloatArray, SamplingParams, npt.NDArray[np.int32], int]) -> None:
    logits, params, history, index = case
    native = sample(logits[None], [params], [history], [index])
    twin = sample_reference(logits[None], [params], [history], [index])
    assert native[0].tolist() == twin[0].tolist()
    np.testing.assert_allclose(native[1], twin[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 1000, "top_p": 0.99, "min_p": 0.01}])
def test_native_equals_twin_at_a_real_vocabulary(fields: dict[str, Any]) -> None:
    logits = np.random.default_rng(2).normal(size=(6, 49152)).astype(np.float32) * 3
    params = [SamplingParams(seed=row, temperature=0.8, **fields) for row in range(6)]
    native = sample(logits, params, [EMPTY] * 6, range(6))
    twin = sample_reference(logits, params, [EMPTY] * 6, range(6))
    assert native[0].tolist() == twin[0].tolist()


def test_weights_are_the_exponential() -> None:
    logits = np.linspace(-10, 0, 10001, dtype=np.float32)
    expected = np.exp(logits.astype(np.float64) / 0.5) * WEIGHT_ONE
    np.testing.assert_allclose(weights(logits, 0.5), expected, rtol=1e-6, atol=0.5)


def test_greedy_takes_the_first_maximum() -> None:
    assert tokens_of([1.0, 7.0, 7.0, -3.0], temperature=0.0) == [1]
    assert tokens_of([-0.0, 0.0], temperature=0.0) == [0]


def test_logprob_is_of_the_model_not_of_the_filters() -> None:
    logits = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    params = SamplingParams(seed=0, temperature=3.0, top_k=1, repetition_penalty=2.0, logit_bias={3: 1000.0})
    tokens, logprobs = sample(logits, [params], [np.array([0], np.int32)], [0])
    assert tokens.tolist() == [3]
    assert logprobs[0] == pytest.approx(-1 - np.log(np.exp([2.0, 1.0, 0.0, -1.0]).sum()), abs=1e-6)


def test_draws_follow_the_softmax() -> None:
    logits, count = np.array([2.0, 1.0, 0.0, -1.0, 1.0]), 20_000
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        seen = np.bincount(tokens_of(logits, count, temperature=temperature), minlength=5) / count
        five_sigma = 5 * np.sqrt(expected * (1 - expected) / count)
        assert (np.abs(seen - expected) < five_sigma).all()


def test_each_filter_keeps_what_it_says() -> None:
    logits = np.log([0.05, 0.4, 0.1, 0.25, 0.2])
    assert set(tokens_of(logits, 500, top_k=2)) == {1, 3}
    assert set(tokens_of(logits, 500, top_p=0.6)) == {1, 3}
    assert set(tokens_of(logits, 500, top_p=0.7)) == {1, 3, 4}
    assert set(tokens_of(logits, 500, min_p=0.3)) == {1, 3, 4}
    assert set(tokens_of(logits, 500, top_k=3, top_p=0.8)) == {1, 3, 4}
    assert set(tokens_of(logits, 500, top_k=3, top_p=0.7)) == {1, 3}
    assert set(tokens_of([1.0] * 6, 500, top_k=2)) == {0, 1}
    assert set(tokens_of([1.0] * 6, 500, top_p=0.5)) == {0, 1, 2}


def test_penalty_and_bias_move_logits() -> None:
    assert tokens_of([2.0, 1.9, -1.0], history=[0, 0], temperature=0.0, repetition_penalty=1.2) == [1]
    assert tokens_of([-1.0, -1.1, -5.0], history=[0], temperature=0.0, repetition_penalty=1.2) == [1]
    assert tokens_of([2.0, 1.9, -1.0], temperature=0.0, logit_bias={2: 3.5}) == [2]


def test_a_token_depends_on_seed_and_index_alone() -> None:
    """Not on the other rows, on the order of calls, or on the thread."""
    logits = np.random.default_rng(3).normal(size=(40, 300)).astype(np.float32)
    params = [SamplingParams(seed=row // 2, temperature=1.5, top_k=100) for row in range(40)]
    together, _ = sample(logits, params, [EMPTY] * 40, range(40))
    alone: dict[int, int] = {}

    def draw(rows: Sequence[int]) -> None:
        for row in rows:
            alone[row] = int(sample(logits[row : row + 1], [params[row]], [EMPTY], [row])[0][0])

    threads = [threading.Thread(target=draw, args=(range(39 - start, -1, -4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [alone[row] for row in range(40)] == together.tolist()
    assert len(set(together.tolist())) > 20


@pytest.mark.parametrize("sampler", [sample, sample_reference])
@pytest.mark.parametrize("broken", [[1.0, np.nan], [np.inf, 1.0], [-np.inf, -np.inf], [np.nan] * 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits(sampler: Any, broken: list[float], temperature: float) -> None:
    logits = np.array([[1.0] * len(broken), broken], np.float32)
    params = SamplingParams(seed=0, temperature=temperature)
    with pytest.raises(SamplingError, match="model's output is broken"):
        sampler(logits, [params] * 2, [EMPTY] * 2, [0, 0])


def test_history_outside_of_the_vocabulary() -> None:
    with pytest.raises(SamplingError, match="token id 3 is outside of the vocabulary of 3"):
        tokens_of([1.0, 2.0, 3.0], history=[3], repetition_penalty=1.1)
