"""ONNX Runtime GenAI on its CPU provider, greedy search.

Its generator can go back to an earlier token only if it has one sequence. With several the context grows from run to
run, and is filled anew when there is no more room.
"""

import json
from typing import Any

import numpy as np
import onnxruntime_genai as og
from driver_protocol import Runner, random_tokens, seconds_of, serve

ROOM = 128
"""Tokens of a decoding sequence past the first context, until it is filled anew."""


class OnnxRunner:
    def __init__(self, job: dict[str, Any]) -> None:
        config = og.Config(job["model"])
        threads = {"intra_op_num_threads": job["threads"]}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = og.Model(config)
        self._vocab_size = job["vocab_size"]
        self._filled: tuple[int, int] | None = None
        self._generator: Any = None
        self._used = 0

    def prefill(self, tokens: int) -> float:
        generator = self._new_generator(1, tokens + 2)
        prompt = np.array([random_tokens(tokens, self._vocab_size)], np.int32)

        def read() -> None:
            generator.append_tokens(prompt)
            generator.generate_next_token()

        return seconds_of(read)

    def decode(self, batch: int, context: int, steps: int) -> float:
        if self._filled != (batch, context) or (batch > 1 and self._used + steps > ROOM):
            self._fill(batch, context)
        elif batch == 1:
            self._generator.rewind_to(context + 1)
        self._used += steps
        return seconds_of(lambda: self._steps(steps))

    def _fill(self, batch: int, context: int) -> None:
        prompt = np.array(random_tokens(batch * context, self._vocab_size), np.int32).reshape(batch, context)
        self._generator = None
        self._generator = self._new_generator(batch, context + ROOM + 2)
        self._generator.append_tokens(prompt)
        self._generator.generate_next_token()
        self._filled, self._used = (batch, context), 0

    def _steps(self, steps: int) -> None:
        for _ in range(steps):
            self._generator.generate_next_token()

    def _new_generator(self, batch: int, tokens: int) -> Any:
        """`min_length` keeps an end-of-text token from ending a sequence."""
        parameters = og.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=batch, do_sample=False, min_length=tokens, max_length=tokens)
        return og.Generator(self._model, parameters)


def load(job: dict[str, Any]) -> Runner:
    return OnnxRunner(job)


if __name__ == "__main__":
    serve(load)
