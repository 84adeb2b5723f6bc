"""A model whose next token is a hash of all tokens before it: any lost, stale or doubled KV changes the text."""

from collections.abc import Sequence
from zlib import crc32

from edgellm.orchestrator.core.values import RequestSpec

VOCAB = 61


def kv_of(prompt: Sequence[int]) -> int:
    """Stands for the KV cache of a prompt."""
    return crc32(repr(tuple(prompt)).encode())


def next_token(prompt_kv: int, generated: Sequence[int], seed: int) -> int:
    """The token after `generated`, given the prompt's KV."""
    return crc32(repr((prompt_kv, tuple(generated), seed)).encode()) % VOCAB


def expected_answer(spec: RequestSpec) -> list[int]:
    """What a request must get, whatever happens to the cluster."""
    generation = spec.generation
    kv, answer = kv_of(spec.prompt), list[int]()
    while len(answer) < generation.max_tokens:
        answer.append(next_token(kv, answer, generation.sampling.seed))
        if answer[-1] in generation.stop_token_ids:
            break
    return answer
