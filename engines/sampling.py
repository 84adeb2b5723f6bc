"""From logits to tokens: greedy or random, reproducible from (seed, token index) alone on any machine."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgellm.engines.sampling_params import SamplingError, SamplingParams
from edgellm.engines.sampling_reference import sample_reference
from edgellm.engines.weights import FloatArray

__all__ = ["SamplingError", "SamplingParams", "sample", "sample_reference"]


def sample(
    logits: FloatArray,
    params: Sequence[SamplingParams],
    histories: Sequence[npt.NDArray[np.int32]],
    indices: Sequence[int],
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Choose one token per row of logits [rows, vocab_size].

    histories: each row's tokens so far, prompt and answer, for the repetition penalty. indices: each row's index of
    the token within its answer. Returns tokens [rows], and the natural log of each one's probability under the plain
    softmax of its logits [rows]. Parameters must have been validated. Raises SamplingError for NaN or infinite logits.
    """
    return sample_reference(logits, params, histories, indices)
