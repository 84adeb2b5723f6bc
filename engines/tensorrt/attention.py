"""Rotation, cache and attention, twice: in the layers made for them, and in primitive ones for versions without."""

from typing import Any, Protocol

import numpy as np

from edgellm.engines.graph import Attention, Rope
from edgellm.engines.tensorrt import interface
from edgellm.engines.tensorrt.layers import Layers, Tensor
from edgellm.engines.tensorrt.step import Step
from edgellm.engines.weights import FloatArray


class AttentionForm(Protocol):
    """Writes the ops that need positions. Head tensors are [batch, heads, chunk, head_dim]."""

    def rope(self, op: Rope, x: Tensor) -> Tensor:
        """float32 heads, rotated."""
        ...

    def attention(self, op: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Half heads of q (already scaled), k and v -> half heads; the layer's caches become inputs and outputs."""
        ...


class FusedAttention:
    """One layer each; the cache is updated in place."""

    def __init__(self, step: Step, *, knows_lengths: bool) -> None:
        """`knows_lengths`: the attention layer takes the number of keys of each slot."""
        self._step = step
        self._layers = step.layers
        self._knows_lengths = knows_lengths

    def rope(self, op: Rope, x: Tensor) -> Tensor:
        cos, sin = rotation_tables(self._layers, op, self._step.bounds.capacity)
        layer = self._layers.network.add_rotary_embedding(x, cos, sin, False, op.rotary_dim)
        self._layers.checked(layer, "a rotary embedding").set_input(3, self._step.positions)
        return layer.get_output(0)

    def attention(self, op: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._updated("k", op, k), self._updated("v", op, v)
        is_simple = self._step.bounds.is_decode and self._knows_lengths
        return (self._one_row if is_simple else self._many_rows)(op, q, keys, values)

    def _one_row(self, op: Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """A slot's only row sees all of its tokens."""
        layer = self._softmax(op, q, keys, values, "LOWER_RIGHT")
        layer.key_value_lengths = self._step.lengths
        return layer.get_output(0)

    def _many_rows(self, op: Attention, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rows of slots of several lengths, with an explicit mask: how LOWER_RIGHT counts where both a chunk is padded
        and slots differ in length is not written down."""
        mask = self._step.is_visible
        keys, values = self._step.first_tokens(keys), self._step.first_tokens(values)
        layer = self._softmax(op, q, keys, values, "NONE")
        layer.mask = mask
        return layer.get_output(0)

    def _softmax(self, op: Attention, q: Tensor, keys: Tensor, values: Tensor, causal: str) -> Any:
        """Decomposable: head sizes that no kernel was made for run in several."""
        trt, network = self._layers.trt, self._layers.network
        softmax = trt.AttentionNormalizationOp.SOFTMAX
        if hasattr(network, "add_attention_v2"):
            layer = network.add_attention_v2(q, keys, values, softmax, getattr(trt.CausalMaskKind, causal))
        else:
            layer = network.add_attention(q, keys, values, softmax, causal != "NONE")
        self._layers.checked(layer, f"the attention of layer {op.layer}").decomposable = True
        return layer

    def _updated(self, kind: str, op: Attention, update: Tensor) -> Tensor:
        layers, step = self._layers, self._step
        cache = cache_input(step, kind, op)
        linear = layers.trt.KVCacheMode.LINEAR
        layer = layers.network.add_kv_cache_update(cache, update, step.write_at, linear)
        updated = layers.checked(layer, f"the cache of layer {op.layer}").get_output(0)
        layers.output(updated, interface.cache_out(interface.cache(kind, op.layer)))
        return updated


class PrimitiveAttention:
    """Matrix products and a softmax over the cache and this step's rows side by side; whoever runs the network writes
    the rows into the cache."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._layers = step.layers
        self._masks: dict[int, Tensor] = {}

    def rope(self, op: Rope, x: Tensor) -> Tensor:
        """x [batch, heads, chunk, head_dim]; left' = left cos - right sin, right' = right cos + left sin."""
        layers, half = self._layers, op.rotary_dim // 2
        cos, sin = (self._at_positions(table) for table in rotation_tables(layers, op, self._step.bounds.capacity))
        left, right = self._columns(x, op, 0, half), self._columns(x, op, half, half)
        rotated = [
            layers.elementwise(self._product(left, cos), self._product(right, sin), "SUB"),
            layers.elementwise(self._product(right, cos), self._product(left, sin), "SUM"),
        ]
        if op.rotary_dim < op.head_dim:
            rotated.append(self._columns(x, op, op.rotary_dim, op.head_dim - op.rotary_dim))
        return layers.concat(rotated, 3)

    def attention(self, op: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers, group = self._layers, op.num_heads // op.kv_heads
        keys, values = self._beside_cache("k", op, k), self._beside_cache("v", op, v)
        grouped = layers.reshape(q, (0, op.kv_heads, -1, op.head_dim))
        scores = layers.cast(layers.matmul(grouped, keys, transpose_b=True), "FLOAT")
        hidden = layers.constant("minus infinity", np.full((1, 1, 1, 1), -np.inf, np.float32))
        weights = layers.softmax(layers.select(self._mask(group), scores, hidden), 3)
        attended = layers.matmul(layers.cast(weights, "HALF"), values)
        return layers.reshape(attended, (0, op.num_heads, -1, op.head_dim))

    def _beside_cache(self, kind: str, op: Attention, rows: Tensor) -> Tensor:
        """half [batch, kv_heads, longest + chunk, head_dim]."""
        cached = self._step.first_tokens(cache_input(self._step, kind, op))
        return self._layers.concat([cached, rows], 2)

    def _mask(self, group: int) -> Tensor:
        """bool [batch, 1, group * chunk, longest + chunk]: a row sees what lies at its position or before."""
        if group not in self._masks:
            layers, after = self._layers, self._step.after
            rows = layers.concat([after] * group, 1) if group > 1 else after
            keys = layers.reshape(self._key_positions(), (0, 1, 1, -1))
            self._masks[group] = layers.elementwise(keys, layers.reshape(rows, (0, 1, -1, 1)), "LESS")
        return self._masks[group]

    def _key_positions(self) -> Tensor:
        """int32 [batch, longest + chunk]: of the cache's tokens, of those not yet written far away, of this step's."""
        layers, step = self._layers, self._step
        tokens = layers.reshape(step.visible, (1, -1))
        is_written = layers.elementwise(tokens, layers.reshape(step.write_at, (-1, 1)), "LESS")
        far = layers.constant("far away", np.full((1, 1), np.iinfo(np.int32).max, np.int32))
        return layers.concat([layers.select(is_written, tokens, far), step.positions], 1)

    def _at_positions(self, table: Tensor) -> Tensor:
        """[capacity, half] -> [batch, 1, chunk, half]."""
        gathered = self._layers.gather(table, self._step.positions, 0)
        return self._layers.shuffle(gathered, shape=(0, 1, -1, table.shape[1]))

    def _columns(self, x: Tensor, op: Rope, start: int, count: int) -> Tensor:
        """Columns of each head."""
        layers = self._layers
        shape = layers.shape(x)
        sizes = layers.sizes(layers.slice(shape, (0,), (3,)), count)
        return layers.slice(x, (0, 0, 0, start), sizes)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return self._layers.elementwise(a, b, "PROD")


def cache_input(step: Step, kind: str, op: Attention) -> Tensor:
    """The cache of K or V of a layer before the step."""
    shape = (-1, op.kv_heads, step.bounds.capacity, op.head_dim)
    return step.layers.input(interface.cache(kind, op.layer), "HALF", shape)


def rotation_tables(layers: Layers, op: Rope, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, rotary_dim / 2], times the attention factor."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * np.asarray(op.inv_freq, np.float32)
    name = f"rotation {hash((op.inv_freq, op.attention_factor)):x}"

    def table(kind: str, values: FloatArray) -> Tensor:
        return layers.constant(f"{name} {kind}", values * np.float32(op.attention_factor))

    return table("cos", np.cos(angles)), table("sin", np.sin(angles))
