"""Calibration text where there is none: what the model itself says, from its first token on."""

from typing import Any, Final

import torch

from edgellm.calib.recipe import Progress

_REPORT_EVERY: Final = 16


@torch.inference_mode()
def sample_windows(
    model: Any, *, bos_token_id: int | None, vocab_size: int, count: int, tokens: int, seed: int, progress: Progress
) -> torch.Tensor:
    """int64 [count, tokens] sampled at temperature 1 from the Hugging Face causal model, all windows in one batch.

    Windows start with BOS, or each with a random token where the model has none. Data-free calibration as in LLM-QAT
    (arXiv 2305.17888): the model's own text is close to what it was trained on, and nothing need be downloaded.
    """
    generator = torch.Generator().manual_seed(seed)
    text = torch.empty((count, tokens), dtype=torch.int64)
    text[:, 0] = torch.randint(vocab_size, (count,), generator=generator) if bos_token_id is None else bos_token_id
    cache = None
    for position in range(1, tokens):
        if position % _REPORT_EVERY == 1:
            progress("sampling calibration text", position, tokens)
        output = model(text[:, position - 1 : position], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1, :vocab_size].float().softmax(-1)
        text[:, position] = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    progress("sampling calibration text", tokens, tokens)
    return text
