"""llama.cpp through llama-cpp-python's low-level batch interface; KV in half precision, attention kernel its choice."""

from collections.abc import Sequence
from ctypes import POINTER, c_float, cast
from typing import Any

import llama_cpp
import numpy as np
from driver_protocol import Runner, random_tokens, seconds_of, serve

PROMPT_BATCH = 2048
ROOM_TOKENS = 256
"""llama.cpp rounds a sequence's room up to this."""


class LlamaCppRunner:
    """A context for each kind of run, since sequences that share no prompt are fastest with a cache of their own each.

    After each run of decoding the tokens past the context are removed from the cache again.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(job["model"].encode(), _model_parameters())
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {job['model']}")
        self._threads = job["threads"]
        self._context: Any = None
        self._memory: Any = None
        self._room = (0, 0)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(PROMPT_BATCH, 0, 1)
        self._filled: tuple[int, int] | None = None

    def prefill(self, tokens: int) -> float:
        self._make_room(1, tokens)
        self._clear()
        prompt = random_tokens(tokens, self._vocab_size)
        return seconds_of(lambda: self._read(0, prompt))

    def decode(self, batch: int, context: int, steps: int) -> float:
        self._make_room(batch, context + steps)
        if self._filled != (batch, context):
            self._clear()
            for sequence in range(batch):
                self._read(sequence, random_tokens(context, self._vocab_size))
            self._filled = (batch, context)
        seconds = seconds_of(lambda: self._steps(batch, context, steps))
        for sequence in range(batch):
            llama_cpp.llama_memory_seq_rm(self._memory, sequence, context, -1)
        return seconds

    def _make_room(self, sequences: int, tokens: int) -> None:
        """For so many sequences of so many tokens each."""
        room = (sequences, -(-tokens // ROOM_TOKENS) * ROOM_TOKENS)
        if room == self._room:
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        self._context = llama_cpp.llama_init_from_model(self._model, _context_parameters(*room, self._threads))
        if not self._context:
            raise ValueError(f"llama.cpp has no room for {room[0]} sequences of {room[1]} tokens")
        self._memory, self._room, self._filled = llama_cpp.llama_get_memory(self._context), room, None

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._filled = None

    def _read(self, sequence: int, prompt: Sequence[int]) -> int:
        for start in range(0, len(prompt), PROMPT_BATCH):
            part = prompt[start : start + PROMPT_BATCH]
            rows = [(token, start + offset, sequence) for offset, token in enumerate(part)]
            self._decode(rows, wanted=[len(part) - 1])
        return self._likeliest(len(part) - 1)

    def _steps(self, batch: int, context: int, steps: int) -> None:
        tokens = [1] * batch
        for position in range(context, context + steps):
            rows = [(token, position, sequence) for sequence, token in enumerate(tokens)]
            self._decode(rows, wanted=range(batch))
            tokens = [self._likeliest(row) for row in range(batch)]

    def _decode(self, rows: Sequence[tuple[int, int, int]], wanted: Sequence[int]) -> None:
        """rows: token, position, sequence of each; wanted: rows whose logits are computed."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (token, position, sequence) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = False
        for row in wanted:
            batch.logits[row] = True
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama_decode of {len(rows)} rows failed with status {status}")

    def _likeliest(self, row: int) -> int:
        logits = cast(llama_cpp.llama_get_logits_ith(self._context, row), POINTER(c_float))
        return int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())


def _model_parameters() -> Any:
    return llama_cpp.llama_model_default_params()


def _context_parameters(sequences: int, tokens: int, threads: int) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = sequences * tokens
    parameters.n_batch = PROMPT_BATCH
    parameters.n_seq_max = sequences
    parameters.n_threads = parameters.n_threads_batch = threads
    return parameters


def load(job: dict[str, Any]) -> Runner:
    return LlamaCppRunner(job)


if __name__ == "__main__":
    serve(load)
