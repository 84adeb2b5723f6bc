import dataclasses

import numpy as np
import pytest

from edgellm.calib.quality import QualityError, log_softmax, measure_quality
from edgellm.calib.recipe import QuantizeOptions
from edgellm.engines.bundle import Quality

WINDOW_TOKENS = 97


@pytest.fixture(scope="module")
def windows(small_model) -> np.ndarray:
    return small_model.sample(3, WINDOW_TOKENS, seed=9)


def measure(small_model, quantized, windows: np.ndarray, progress, *, max_rows: int = 64) -> Quality:
    graph, weights = quantized
    pools = [small_model.pool(8), small_model.pool(8)]
    quality = measure_quality(
        reference=small_model.reference,
        prefill=small_model.engine(small_model.graph, small_model.weights, pools[0], max_rows),
        decode=small_model.engine(graph, weights, pools[1], max_rows),
        windows=windows,
        text="sampled",
        progress=progress,
    )
    assert [pool.free_blocks for pool in pools] == [8, 8]
    return quality


def test_quality_is_ordered_as_it_must_be(small_model, quantized, windows: np.ndarray, progress) -> None:
    quality = measure(small_model, quantized, windows, progress)
    kl, perplexity = quality.kl_to_reference, quality.perplexity
    assert (quality.text, quality.windows, quality.window_tokens) == ("sampled", 3, WINDOW_TOKENS)
    assert kl["reference"] == 0
    assert 0 <= kl["half"] < 1e-4
    assert kl["half"] < kl["hybrid"] < kl["int4"] < 0.1
    assert perplexity["half"] == pytest.approx(perplexity["reference"], rel=1e-3)
    assert perplexity["int4"] == pytest.approx(perplexity["reference"], rel=0.15)


def test_reference_perplexity_is_of_the_second_half(small_model, quantized, windows: np.ndarray, progress) -> None:
    quality = measure(small_model, quantized, windows, progress)
    first = WINDOW_TOKENS // 2
    losses = [
        -log_softmax(small_model.reference(window))[np.arange(first, WINDOW_TOKENS - 1), window[first + 1 :]]
        for window in windows
    ]
    assert quality.perplexity["reference"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)


def test_chunks_do_not_change_the_result(stories, progress) -> None:
    """But for the order of NumPy's sums, which can tip the rounding of an activation."""
    text = stories.sample(2, 70, seed=4)
    whole, cut = (measure(stories, stories.quantized(), text, progress, max_rows=rows) for rows in (128, 7))
    assert whole.perplexity == pytest.approx(cut.perplexity, rel=1e-2)
    assert whole.perplexity["half"] == pytest.approx(cut.perplexity["half"], rel=1e-4)


def test_more_outliers_cost_less(stories, progress) -> None:
    text = stories.sample(4, 128, seed=5)
    few, many = (
        measure(stories, stories.quantized(QuantizeOptions(outliers=count)), text, progress) for count in (0, 16)
    )
    assert many.kl_to_reference["int4"] < few.kl_to_reference["int4"]


def test_blocks_are_freed_when_an_engine_fails(stories, progress) -> None:
    graph, weights = stories.quantized()
    pool = stories.pool(8)
    broken = stories.engine(graph, weights, pool)
    broken.spec = dataclasses.replace(broken.spec, vocab_size=2)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        measure_quality(
            reference=stories.reference,
            prefill=stories.engine(stories.graph, stories.weights, pool),
            decode=broken,
            windows=stories.sample(1, 40, seed=0),
            text="sampled",
            progress=progress,
        )
    assert pool.free_blocks == 8


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0, 8), "at least one window"), ((1, 3), "at least 4 tokens"), ((1, 600), "takes at most 512")],
)
def test_bad_windows_are_refused(stories, progress, shape: tuple[int, int], message: str) -> None:
    engine = stories.engine(stories.graph, stories.weights, stories.pool(8))
    with pytest.raises(QualityError, match=message):
        measure_quality(
            reference=stories.reference,
            prefill=engine,
            decode=engine,
            windows=np.zeros(shape, np.int64),
            text="zeros",
            progress=progress,
        )


def test_engines_of_different_contracts_are_refused(stories, progress) -> None:
    other = dataclasses.replace(stories, contract=dataclasses.replace(stories.contract, dtype="int8"))
    with pytest.raises(QualityError, match="not of one bundle"):
        measure_quality(
            reference=stories.reference,
            prefill=stories.engine(stories.graph, stories.weights, stories.pool(8)),
            decode=other.engine(stories.graph, stories.weights, other.pool(8)),
            windows=np.zeros((1, 8), np.int64),
            text="zeros",
            progress=progress,
        )
