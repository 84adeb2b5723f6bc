"""What quantisation costs: perplexity and KL of the engines, on text that was not calibrated on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgellm.calib.recipe import Progress
from edgellm.calib.replay import copy_kv, kv_blocks, run_tokens
from edgellm.engines.base import Engine
from edgellm.engines.bundle import Quality
from edgellm.engines.weights import FloatArray

Tokens: TypeAlias = npt.NDArray[np.int64]
Reference: TypeAlias = Callable[[Tokens], FloatArray]
"""Tokens [n] -> next-token logits [n, vocab_size] in full precision."""


class QualityError(ValueError):
    """The windows cannot be measured with these engines; the message says what to do."""


def measure_quality(
    *,
    reference: Reference,
    prefill: Engine,
    decode: Engine,
    windows: Tokens,
    text: str,
    progress: Progress,
) -> Quality:
    """Perplexity, and mean KL(reference || engine) in nats, of predicting the tokens of each window's second half.

    windows int64 [count, tokens]; `text` says where they came from. `half` and `int4` run whole windows through the
    prefill and the decode engine; `hybrid` runs the first half through the prefill engine and the second half,
    teacher-forced, through the decode engine on the KV of the first. A token counts if its predictor is in the second
    half too, so all four compare the same `tokens - tokens // 2 - 1` tokens per window. Both engines hold all layers;
    the KV of two windows must fit into their pools, and all blocks are free again afterwards. Raises QualityError.
    """
    _check(windows, prefill, decode)
    losses = {name: _Losses() for name in ("reference", "half", "int4", "hybrid")}
    for done, window in enumerate(windows):
        progress("measuring quality", done, len(windows))
        _measure_window(reference, prefill, decode, window, losses)
    progress("measuring quality", len(windows), len(windows))
    return Quality(
        text=text,
        windows=len(windows),
        window_tokens=windows.shape[1],
        perplexity={name: loss.perplexity for name, loss in losses.items()},
        kl_to_reference={name: loss.mean_kl for name, loss in losses.items()},
    )


def _measure_window(
    reference: Reference, prefill: Engine, decode: Engine, window: Tokens, losses: Mapping[str, "_Losses"]
) -> None:
    first = len(window) // 2
    targets = window[first + 1 :]
    log_p = log_softmax(reference(window)[first:-1])
    losses["reference"].add(log_p, log_p, targets)
    for name, logits in _engine_logits(prefill, decode, window[:-1], first).items():
        losses[name].add(log_softmax(logits), log_p, targets)


def _engine_logits(prefill: Engine, decode: Engine, tokens: Tokens, first: int) -> dict[str, FloatArray]:
    """Logits [len(tokens) - first, vocab_size] after each token from position `first` on, for each way to run."""
    with kv_blocks(prefill, len(tokens)) as prompt, kv_blocks(decode, len(tokens)) as copy:
        run_tokens(prefill, prompt, tokens[:first], 0, logits_from=first)
        copy_kv(prefill.kv, prompt, decode.kv, copy)
        half = run_tokens(prefill, prompt, tokens[first:], first)
        hybrid = run_tokens(decode, copy, tokens[first:], first)
    with kv_blocks(decode, len(tokens)) as blocks:
        int4 = run_tokens(decode, blocks, tokens, 0, logits_from=first)
    return {"half": half, "int4": int4, "hybrid": hybrid}


@dataclass(kw_only=True)
class _Losses:
    """Sums over tokens, in nats."""

    tokens: int = 0
    cross_entropy: float = 0.0
    kl: float = 0.0

    def add(self, log_q: npt.NDArray[np.float64], log_p: npt.NDArray[np.float64], targets: Tokens) -> None:
        """Log-probabilities [n, vocab_size], `log_p` those of the reference; targets [n]."""
        self.tokens += len(targets)
        self.cross_entropy -= float(np.take_along_axis(log_q, targets[:, None], axis=1).sum())
        self.kl += float((np.exp(log_p) * (log_p - log_q)).sum())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.cross_entropy / self.tokens))

    @property
    def mean_kl(self) -> float:
        return self.kl / self.tokens


def log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _check(windows: Tokens, prefill: Engine, decode: Engine) -> None:
    if windows.ndim != 2 or not len(windows) or windows.shape[1] < 4:
        raise QualityError(f"windows {list(windows.shape)}: at least one window of at least 4 tokens is needed")
    tokens = windows.shape[1]
    for engine in (prefill, decode):
        if tokens > engine.spec.limits.max_seq_len:
            raise QualityError(
                f"windows of {tokens} tokens; engine {engine.spec.name} takes at most {engine.spec.limits.max_seq_len}"
            )
    if prefill.kv.contract != decode.kv.contract:
        raise QualityError(f"{prefill.spec.name} and {decode.spec.name} differ in their KV contract: not of one bundle")
