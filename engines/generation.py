"""What a bundle's tokenizer/generation.json says."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The model's special tokens, and the sampling it recommends; the defaults are greedy."""

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    bos_token: str
    """Text of the token, which chat templates use; empty where there is none."""
    eos_token: str
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
