"""Calibration text where there is none: what the model itself says, from its first token on."""

from typing import Final

import numpy as np
import numpy.typing as npt

from edgellm.calib.recipe import Progress
from edgellm.calib.replay import kv_blocks
from edgellm.engines.base import Batch, Engine
from edgellm.engines.sampling import SamplingParams, sample

_REPORT_EVERY: Final = 16
_SEEDS_PER_TEXT: Final = 1 << 32


def sample_windows(
    engine: Engine, *, bos_token_id: int | None, count: int, tokens: int, seed: int, progress: Progress
) -> npt.NDArray[np.int64]:
    """int64 [count, tokens] sampled at temperature 1 from an engine of the whole model, all windows in one batch.

    Windows start with BOS, or each with a random token where the model has none. Data-free calibration as in LLM-QAT
    (arXiv 2305.17888): the model's own text is close to what it was trained on, and nothing need be downloaded. The
    engine needs KV for all windows, and gets it back.
    """
    text = np.empty((count, tokens), np.int64)
    starts = np.random.default_rng(seed).integers(engine.spec.vocab_size, size=count)
    text[:, 0] = starts if bos_token_id is None else bos_token_id
    params = [SamplingParams(temperature=1.0, seed=seed * _SEEDS_PER_TEXT + window) for window in range(count)]
    with kv_blocks(engine, tokens, windows=count) as blocks:
        _continue(engine, text, params, np.array(blocks, np.int32).reshape(count, -1), progress)
    progress("sampling calibration text", tokens, tokens)
    return text


def _continue(
    engine: Engine,
    text: npt.NDArray[np.int64],
    params: list[SamplingParams],
    tables: npt.NDArray[np.int32],
    progress: Progress,
) -> None:
    """Fill `text` [count, tokens] from its first column on."""
    count, tokens = text.shape
    for position in range(1, tokens):
        if position % _REPORT_EVERY == 1:
            progress("sampling calibration text", position, tokens)
        logits = engine.forward(_step(text[:, position - 1], position - 1, tables)).logits
        if logits is None:
            raise ValueError(f"engine {engine.spec.name} is no last stage: it has no logits to sample from")
        histories = [np.empty(0, np.int32)] * count
        text[:, position] = sample(logits, params, histories, [position] * count)[0]


def _step(tokens: npt.NDArray[np.int64], position: int, tables: npt.NDArray[np.int32]) -> Batch:
    """One token of every window."""
    count = len(tokens)
    return Batch(
        tokens=tokens.astype(np.int32),
        hidden=None,
        row_starts=np.arange(count + 1, dtype=np.int32),
        first_positions=np.full(count, position, np.int32),
        block_tables=tables,
        logit_rows=np.arange(count, dtype=np.int32),
    )
