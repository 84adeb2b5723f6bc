"""What the compiler decides: fusion, memory, packed layouts, and that equal inputs give equal bytes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgellm.engines.cpu import pack, plan
from edgellm.engines.cpu.buffers import BufferPlanner
from edgellm.engines.cpu.compiler import PLAN_FILE, WEIGHTS_FILE, compile_engine
from edgellm.engines.cpu.engine import load_plan
from edgellm.engines.cpu.fuse import FusedAttention, FusedLinear, fuse
from edgellm.engines.graph import Half, Int4, Int8, Rope


def compiled(kit, model, folder, weights=None, progress=None):
    folder.mkdir(exist_ok=True)
    contract = kit.contract_of(model)
    compile_engine(
        model.graph, weights or model.weights, contract=contract, limits=kit.limits, folder=folder, progress=progress
    )
    return load_plan(folder)


def test_llama_fuses_into_four_linears_a_layer(kit):
    ops = fuse(kit.model("llama", Half(), kit.sizes(layers=1)).graph)
    linears = [op for op in ops if isinstance(op, FusedLinear)]
    assert [len(linear.parts) for linear in linears] == [3, 1, 2, 1, 1]
    assert [linear.residual for linear in linears] == [None, "x", None, "layer0.mid", None]
    attention = next(op for op in ops if isinstance(op, FusedAttention))
    assert (attention.q, attention.k) == ("layer0.q", "layer0.k")


def test_both_adds_of_a_parallel_residual_fuse(kit):
    ops = fuse(kit.model("neox", Half(), kit.sizes(layers=1)).graph)
    assert Counter(type(op).__name__ for op in ops)["Add"] == 1
    residuals = {op.outs[0]: op.residual for op in ops if isinstance(op, FusedLinear) and op.residual}
    assert residuals == {"layer0.both": "layer0.o"}


def test_a_rope_that_others_read_is_refused(kit):
    graph = kit.model("llama", Half(), kit.sizes()).graph
    rope = next(op for op in graph.ops if isinstance(op, Rope))
    with pytest.raises(ValueError, match=r"Rope 'layer0.q.rotated'"):
        fuse(replace(graph, ops=graph.ops, output=rope.out))


@pytest.mark.parametrize("precision", [Half(), Int8(), Int4(group_size=32, outliers=4)], ids=lambda p: p.kind)
def test_equal_inputs_give_equal_bytes(kit, precision, tmp_path):
    model = kit.model("llama", precision, kit.sizes(intermediate=160))
    for name in ("a", "b"):
        compiled(kit, model, tmp_path / name)
    for file in (PLAN_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


class OnceOnly(dict):
    """A store that a second look-up of a name breaks."""

    def __getitem__(self, name):
        return self.pop(name)


def test_weights_are_looked_up_once(kit, tmp_path):
    model = kit.model("qwen2", Int4(group_size=32), kit.sizes(intermediate=160))
    calls = []
    compiled(kit, model, tmp_path, OnceOnly(model.weights), lambda done, total: calls.append((done, total)))
    assert calls == [(done, len(model.weights)) for done in range(1, len(model.weights) + 1)]


def test_a_tied_head_is_stored_once(kit, tmp_path):
    found = compiled(kit, kit.model("llama", Half(), kit.sizes()), tmp_path)
    embed = next(op for op in found.ops if isinstance(op, plan.EmbedOp))
    head = [op for op in found.ops if isinstance(op, plan.LinearOp)][-1]
    assert head.weight == embed.table


def test_segments_are_aligned_and_inside_the_file(kit, tmp_path):
    model = kit.model("qwen2", Int4(group_size=32, outliers=3), kit.sizes(intermediate=160))
    found = compiled(kit, model, tmp_path)
    assert found.weights_bytes == (tmp_path / WEIGHTS_FILE).stat().st_size
    for segment in plan.segments(found):
        assert segment.offset % plan.SEGMENT_ALIGNMENT == 0
        assert segment.offset + segment.bytes <= found.weights_bytes


@given(
    lives=st.lists(st.tuples(st.integers(1, 500), st.integers(0, 20), st.integers(0, 9)), min_size=1, max_size=30),
    ops_per_round=st.integers(1, 4),
)
def test_buffers_that_live_together_never_share_memory(lives, ops_per_round):
    planner = BufferPlanner()
    for row_bytes, first, length in lives:
        planner.touch(planner.new(row_bytes, first), first + length)
    rounds = [op // ops_per_round for op in range(30)]
    placed = planner.place(rounds)
    spans = [
        (rounds[first], rounds[first + length], buffer)
        for (_, first, length), buffer in zip(lives, placed, strict=True)
    ]
    for index, (first, last, buffer) in enumerate(spans):
        assert buffer.row_bytes >= lives[index][0]
        for other_first, other_last, other in spans[:index]:
            together = first <= other_last and other_first <= last
            apart = (
                buffer.row_offset >= other.row_offset + other.row_bytes
                or other.row_offset >= buffer.row_offset + buffer.row_bytes
            )
            assert apart or not together


def test_row_ops_in_a_row_are_one_round(kit, tmp_path):
    ops = compiled(kit, kit.model("llama", Half(), kit.sizes()), tmp_path).ops
    rounds = plan.rounds(ops)
    kinds = [type(op) for op in ops]
    for index in range(1, len(ops)):
        together = {kinds[index - 1], kinds[index]} <= {plan.NormOp, plan.PrepareOp, plan.ActivateOp, plan.AddOp}
        assert rounds[index] == rounds[index - 1] + (not together)
    assert len(rounds) == len(ops) + 1
    assert len(set(rounds)) < len(rounds)


def test_half_panels(kit):
    weight = np.arange(20 * 5, dtype=np.float32).reshape(20, 5)
    packed = pack.pack_half(weight, 32)
    assert packed.shape == (2, 16, 16, 2)
    assert packed[1, 2, 3, 0] == pack.bf16_bits(weight[19:, 4:])[0, 0]
    assert not packed[1, :, 4:].any()


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127)))
def test_bf16_is_the_nearest(value):
    exact = np.float32(value)
    bits = pack.bf16_bits(np.array([exact]))[0]
    rounded = (np.array([bits], np.uint32) << 16).view(np.float32)[0]
    neighbours = (np.array([bits - 1 if bits & 0x7FFF else bits, bits + 1], np.uint32) << 16).view(np.float32)
    error = abs(np.float64(rounded) - exact)
    assert all(error <= abs(np.float64(neighbour) - exact) for neighbour in neighbours if np.isfinite(neighbour))


def test_int4_panels():
    q = np.random.default_rng(0).integers(-8, 8, (20, 16)).astype(np.int8)
    packed = pack.pack_int4(q)
    assert packed.shape == (2, 2, 16, 4)
    assert packed[0, 1, 5, 2] & 15 == q[5, 8 + 2] + 8
    assert packed[1, 0, 3, 1] >> 4 == q[19, 4 + 1] + 8


@given(st.integers(-40, 40), st.integers(1, 40))
def test_group_scales_keep_their_precision(exponent, columns):
    scale = np.random.default_rng(columns).uniform(0.1, 1, (columns, 3)).astype(np.float32) * np.float32(2.0**exponent)
    panels, column_scale = pack.pack_group_scales(scale)
    restored = panels.astype(np.float32) * column_scale.reshape(-1, 1, 16)
    restored = restored.transpose(0, 2, 1).reshape(-1, 3)
    np.testing.assert_allclose(restored[:columns], scale, rtol=2.0**-11)
    assert not restored[columns:].any()
