"""OpenVINO GenAI's continuous batching pipeline, one step of its scheduler at a time.

Its prefix cache keeps the contexts that decoding starts from, so that a run computes only their last block again. Where
prompts are measured there is none.
"""

import itertools
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from driver_protocol import Runner, random_tokens, seconds_of, serve

BLOCK_TOKENS = 32


class OpenvinoRunner:
    """Requests are added with token ids; KV is kept as the CPU plugin likes it (8 bits)."""

    def __init__(self, job: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = job["kv_tokens"]
        scheduler.num_kv_blocks = job["kv_tokens"] // BLOCK_TOKENS
        scheduler.max_num_seqs = job["max_batch"]
        scheduler.enable_prefix_caching = "prefill" not in job["phases"]
        properties = {"INFERENCE_NUM_THREADS": job["threads"]}
        self._pipeline = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)
        self._vocab_size = job["vocab_size"]
        self._ids = itertools.count()
        self._filled: tuple[int, int] | None = None
        self._prompts: list[list[int]] = []

    def prefill(self, tokens: int) -> float:
        handle = self._add(random_tokens(tokens, self._vocab_size), 1)
        seconds = seconds_of(self._finish)
        if not handle.read():
            raise ValueError(f"the pipeline did not answer a prompt of {tokens} tokens")
        return seconds

    def decode(self, batch: int, context: int, steps: int) -> float:
        if self._filled != (batch, context):
            self._filled = (batch, context)
            self._prompts = [random_tokens(context, self._vocab_size) for _ in range(batch)]
        handles = [self._add(prompt, steps + 1) for prompt in self._prompts]
        while not all(handle.can_read() for handle in handles):
            self._pipeline.step()
        return seconds_of(self._finish)

    def _add(self, prompt: list[int], new_tokens: int) -> Any:
        """The handle has to be kept: without it the pipeline forgets the request."""
        wanted = genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        return self._pipeline.add_request(next(self._ids), ov.Tensor(np.array([prompt], np.int64)), wanted)

    def _finish(self) -> None:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()


def load(job: dict[str, Any]) -> Runner:
    return OpenvinoRunner(job)


if __name__ == "__main__":
    serve(load)
