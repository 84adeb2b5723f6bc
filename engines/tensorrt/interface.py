"""What goes into an engine and comes out: names, types and bounds, shared by the emitter, the manifest and the runner.

Rows are padded to [batch, chunk]. A batch row is a slot: its cache is `[kv_heads, capacity, head_dim]` of one
sequence, linear in its positions.
"""

from dataclasses import dataclass
from typing import Final

TOKENS: Final = "tokens"
"""int32 [batch, chunk], on a first stage."""
HIDDEN: Final = "hidden"
"""float32 [batch, chunk, hidden_size], on a later stage; as an output, on an earlier one."""
POSITIONS: Final = "positions"
"""int32 [batch, chunk], each below the capacity; rows of padding too."""
WRITE_AT: Final = "write_at"
"""int32 [batch]: position of the chunk's first row in its slot."""
LENGTHS: Final = "lengths"
"""int32 [batch]: tokens of the slot that are visible, this step's included; where attention takes them."""
VISIBLE: Final = "visible"
"""int32 [longest]: 0, 1, 2, ... up to the longest sequence of the step; where attention does not take lengths."""
SELECTED: Final = "selected"
"""int32 [selected]: rows of the flattened batch whose logits are wanted; only where a chunk can be longer."""
LOGITS: Final = "logits"
"""float32 [selected, vocab_size]; every row where a chunk is one token."""


def cache(kind: str, layer: int) -> str:
    """Cache input of K (`k`) or V (`v`) of a model layer: half [batch, kv_heads, capacity, head_dim]."""
    return f"cache.{layer:04}.{kind}"


def is_cache(name: str) -> bool:
    """Whether this is the name of a cache input."""
    return name.startswith("cache.")


def cache_out(name: str) -> str:
    """The cache `name` after the step, in the same memory; where the network can write a cache."""
    return f"out.{name}"


def new_rows(name: str) -> str:
    """What the step adds to the cache `name`: half [batch, kv_heads, chunk, head_dim]. Where the network cannot write a
    cache, the runner copies them there."""
    return f"new.{name}"


def rows(tensor: str) -> str:
    """A tensor of the graph that crosses from one network of an engine to the next: float32 [batch, chunk, width]."""
    return f"rows.{tensor}"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Sizes that a network is made for."""

    max_batch: int
    """Slots in one step."""
    max_chunk: int
    """Rows of a slot in one step; 1 makes a decode network."""
    max_seq_len: int
    max_selected: int
    """Rows of a step whose logits can be had."""

    @property
    def capacity(self) -> int:
        """Tokens a slot's cache holds: what is padding may be written beyond the longest sequence. A multiple of 64."""
        return -(-(self.max_seq_len + self.max_chunk) // 64) * 64

    @property
    def is_decode(self) -> bool:
        return self.max_chunk == 1
