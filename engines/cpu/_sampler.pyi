import numpy as np
import numpy.typing as npt

class Params:
    def __init__(
        self, *, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int
    ) -> None: ...

class Sampler:
    def __init__(self, vocab_size: int) -> None: ...
    def sample(
        self,
        logits: npt.NDArray[np.float32],
        params: Params,
        history: npt.NDArray[np.int32],
        bias_tokens: npt.NDArray[np.int32],
        bias_values: npt.NDArray[np.float32],
        index: int,
    ) -> tuple[int, float]: ...
