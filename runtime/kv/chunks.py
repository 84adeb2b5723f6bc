"""Cutting a prompt's KV into chunks: whole blocks x layers x heads, each near a given number of bytes."""

from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.engines.kv import KvContract


@dataclass(frozen=True, kw_only=True, slots=True)
class KvRange:
    """The KV of some tokens of one sequence, in some layers and heads of the model."""

    layers: range
    heads: range
    tokens: range
    """Starts at a block; ends at one, or with the prompt."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, tokens, heads)."""
        return len(self.layers), len(self.tokens), len(self.heads)

    def blocks(self, contract: KvContract) -> range:
        """The sequence's blocks that the tokens lie in."""
        return range(self.tokens.start // contract.block_tokens, contract.blocks_for(self.tokens.stop))


def sendable_tokens(contract: KvContract, *, computed: int, prompt_tokens: int) -> int:
    """How many of the `computed` tokens may be sent: whole blocks, or all of a finished prompt."""
    return computed if computed == prompt_tokens else computed - computed % contract.block_tokens


def cut(contract: KvContract, tokens: range, layers: range, heads: range, *, max_bytes: int) -> Iterator[KvRange]:
    """Cut into ranges of at most `max_bytes` stored bytes each (or one block of one layer, where that is more).

    Layers are kept together as far as they fit; within a group of layers, tokens go in order.
    """
    block_bytes = contract.block_bytes * len(heads) // contract.kv_heads
    blocks_per_range = max(1, max_bytes // block_bytes)
    tokens_per_range = contract.block_tokens * min(blocks_per_range, contract.blocks_for(max(1, len(tokens))))
    layers_per_range = max(1, max_bytes * contract.block_tokens // (block_bytes * tokens_per_range))
    for first_layer in range(layers.start, layers.stop, layers_per_range):
        some_layers = range(first_layer, min(first_layer + layers_per_range, layers.stop))
        for first_token in range(tokens.start, tokens.stop, tokens_per_range):
            some_tokens = range(first_token, min(first_token + tokens_per_range, tokens.stop))
            yield KvRange(layers=some_layers, heads=heads, tokens=some_tokens)
