"""The tokens of one sequence, as far as they are known."""

import numpy as np
import numpy.typing as npt

from edgellm.runtime.batching.steps import Sample, Sampled
from edgellm.runtime.generation import Generation, SampledToken


class Transcript:
    """A prompt and what was generated after it."""

    def __init__(self, prompt: npt.NDArray[np.int32], generated: npt.NDArray[np.int32], generation: Generation) -> None:
        self._generation = generation
        self._num_prompt = len(prompt)
        self.num_tokens = len(prompt) + len(generated)
        self._tokens = np.empty(self._num_prompt + generation.max_tokens, np.int32)
        self._tokens[: self.num_tokens] = np.concatenate([prompt, generated])

    def rows(self, first: int, count: int) -> npt.NDArray[np.int32]:
        """View of `count` known tokens."""
        return self._tokens[first : first + count]

    def next_sample(self) -> Sample:
        """How to draw the token after the last one."""
        history = self._tokens[: self.num_tokens]
        return Sample(sampling=self._generation.sampling, history=history, index=self.num_tokens - self._num_prompt)

    def append(self, draw: Sampled) -> SampledToken:
        """Take in what was drawn."""
        index = self.num_tokens - self._num_prompt
        self._tokens[self.num_tokens] = draw.token_id
        self.num_tokens += 1
        finish = self._generation.finish_reason(index, draw.token_id)
        return SampledToken(index=index, token_id=draw.token_id, logprob=draw.logprob, finish=finish)
