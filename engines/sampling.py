"""From logits to tokens: greedy or random, reproducible from (seed, token index) alone on any machine."""

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgellm.engines.cpu._sampler import Params, Sampler
from edgellm.engines.sampling_params import SamplingError, SamplingParams
from edgellm.engines.sampling_reference import sample_reference
from edgellm.engines.weights import FloatArray

__all__ = ["SamplingError", "SamplingParams", "sample", "sample_reference"]

_thread = threading.local()


def sample(
    logits: FloatArray,
    params: Sequence[SamplingParams],
    histories: Sequence[npt.NDArray[np.int32]],
    indices: Sequence[int],
) -> tuple[npt.NDArray[np.int32], FloatArray]:
    """Choose one token per row of logits [rows, vocab_size]; the GIL is released.

    histories: each row's tokens so far, prompt and answer, for the repetition penalty. indices: each row's index of
    the token within its answer. Returns tokens [rows], and the natural log of each one's probability under the plain
    softmax of its logits [rows]. Parameters must have been validated. Raises SamplingError for logits with NaN or
    +infinity, and for token ids outside of the vocabulary.
    """
    sampler = _sampler(logits.shape[1])
    tokens, logprobs = np.empty(len(logits), np.int32), np.empty(len(logits), np.float32)
    for row, (values, wanted, history, index) in enumerate(zip(logits, params, histories, indices, strict=True)):
        biases = wanted.logit_bias
        bias_tokens = np.fromiter(biases.keys(), np.int32, len(biases))
        bias_values = np.fromiter(biases.values(), np.float32, len(biases))
        try:
            chosen = sampler.sample(values, _native(wanted), history, bias_tokens, bias_values, index)
        except ValueError as error:
            raise SamplingError(f"row {row}: {error}") from error
        tokens[row], logprobs[row] = chosen
    return tokens, logprobs


def _native(params: SamplingParams) -> Params:
    return Params(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        seed=params.seed,
    )


def _sampler(vocab_size: int) -> Sampler:
    """This thread's buffers for this vocabulary, made at first use."""
    samplers: dict[int, Sampler] = _thread.__dict__.setdefault("samplers", {})
    if vocab_size not in samplers:
        samplers[vocab_size] = Sampler(vocab_size)
    return samplers[vocab_size]
