"""transformers in bf16, in PyTorch's eager mode with its own attention kernel."""

from typing import Any

import torch
from driver_protocol import Runner, random_tokens, seconds_of, serve
from transformers import AutoModelForCausalLM


class TransformersRunner:
    """The cache is cut back after each run, so that every run sees the same context."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        self._model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, local_files_only=True)
        self._model.eval()
        self._filled: tuple[int, int] | None = None
        self._cache: Any = None

    def prefill(self, tokens: int) -> float:
        prompt = self._prompt(1, tokens)
        return seconds_of(lambda: self._forward(prompt, None))

    def decode(self, batch: int, context: int, steps: int) -> float:
        if self._filled != (batch, context):
            self._cache = self._forward(self._prompt(batch, context), None).past_key_values
            self._filled = (batch, context)
        seconds = seconds_of(lambda: self._steps(batch, steps))
        self._cache.crop(-steps)
        return seconds

    def _steps(self, batch: int, steps: int) -> None:
        token = torch.ones(batch, 1, dtype=torch.long)
        for _ in range(steps):
            token = self._forward(token, self._cache).logits[:, -1:].argmax(-1)

    @torch.inference_mode()
    def _forward(self, tokens: torch.Tensor, cache: Any) -> Any:
        return self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _prompt(self, batch: int, tokens: int) -> torch.Tensor:
        return torch.tensor(random_tokens(batch * tokens, self._model.config.vocab_size)).reshape(batch, tokens)


def load(job: dict[str, Any]) -> Runner:
    return TransformersRunner(job)


if __name__ == "__main__":
    serve(load)
