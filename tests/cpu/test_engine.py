"""The native engine computes what the graph says: held to the NumPy interpreter on small random models."""

import numpy as np
import pytest

from edgellm.engines.graph import Half, Int4, Int8

PRECISIONS = {
    "half": Half(),
    "int8": Int8(),
    "int8-a16": Int8(act_bits=16),
    "int4": Int4(group_size=32),
    "int4-outliers": Int4(group_size=32, outliers=5),
    "int4-a16": Int4(group_size=32, act_bits=16, outliers=3),
}


def sizes_for(kit, precision, **changes):
    """Int4's groups must divide K."""
    return kit.sizes(**({"intermediate": 160} if isinstance(precision, Int4) else {}) | changes)


def two_prompts_then_one_token(kit, engine):
    """Logits of a step with two prompts, then of one with a token of each."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 101, 80)
    first = [
        kit.chunk(tokens=tokens[:67], first_position=0, blocks=[3, 9, 1]),
        kit.chunk(tokens=tokens[67:78], first_position=0, blocks=[4]),
    ]
    second = [
        kit.chunk(tokens=tokens[78:79], first_position=67, blocks=[3, 9, 1]),
        kit.chunk(tokens=tokens[79:], first_position=11, blocks=[4]),
    ]
    return np.concatenate([kit.logits(engine, kit.batch_of(chunks)) for chunks in (first, second)])


def row_errors(found, expected):
    """[rows]: each row's largest error, relative to the largest logit."""
    return np.abs(found - expected).max(axis=1) / np.abs(expected).max()


def rounds_activations(isa, precision):
    """Whether activations are rounded, to bf16 or 15 bits, where the interpreter keeps float32. AMX attends in bf16."""
    bf16 = isa == "avx512" and (precision == Half() or getattr(precision, "outliers", 0) > 0)
    return isa == "amx" or bf16 or precision == Int8(act_bits=16)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "neox"])
def test_logits_equal_the_interpreter(kit, loader, isa, architecture, precision, dtype):
    """Rows agree to float32's rounding until a value falls on the other side of a quantisation step, which later rows
    of the same sequence then see in the cache."""
    rotary_dim = 4 if architecture == "neox" else 8
    model = kit.model(architecture, precision, sizes_for(kit, precision, rotary_dim=rotary_dim))
    expected = two_prompts_then_one_token(kit, loader.reference(model, dtype=dtype))
    found = two_prompts_then_one_token(kit, loader.cpu(model, isa=isa, dtype=dtype))
    errors = row_errors(found, expected)
    assert np.quantile(errors, 0.05) < (0.02 if rounds_activations(isa, precision) else 2e-5)
    assert errors.max() < 0.1


@pytest.mark.parametrize("head_dim", [12, 20, 64, 80])
def test_head_sizes(kit, loader, isa, head_dim):
    sizes = kit.sizes(head_dim=head_dim, rotary_dim=head_dim // 2, num_heads=6, kv_heads=2)
    model = kit.model("llama", Half(), sizes)
    expected = two_prompts_then_one_token(kit, loader.reference(model))
    assert row_errors(two_prompts_then_one_token(kit, loader.cpu(model, isa=isa)), expected).max() < 0.03


def test_four_bit_activations(kit, loader, isa):
    """Steps of a seventh of the largest value: a flipped tie is visible, so only the bulk is held to be close."""
    precision = Int4(group_size=32, act_bits=4, outliers=4)
    model = kit.model("llama", precision, sizes_for(kit, precision))
    expected = two_prompts_then_one_token(kit, loader.reference(model))
    found = two_prompts_then_one_token(kit, loader.cpu(model, isa=isa))
    attends_in_bf16 = isa == "amx"  # flips more of them
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > (0.93 if attends_in_bf16 else 0.97)


def test_outputs_are_views_of_the_selected_rows(kit, loader, isa):
    model = kit.model("llama", Half(), kit.sizes())
    engine = loader.cpu(model, isa=isa)
    chunk = kit.chunk(tokens=np.arange(10), first_position=0, blocks=[0])
    whole = kit.batch_of([chunk])
    every = kit.logits(engine, whole)
    for rows in ([9], [2, 7], []):
        batch = type(whole)(**vars(whole) | {"logit_rows": np.array(rows, np.int32)})
        np.testing.assert_array_equal(kit.logits(engine, batch), every[rows])


def test_two_precisions_share_one_pool(kit, loader, isa):
    """A prompt's blocks, written by the half-precision engine, are the int4 engine's input."""
    sizes = sizes_for(kit, Int4(group_size=32))
    half = kit.model("llama", Half(), sizes, seed=3)
    int4 = kit.model("llama", Int4(group_size=32), sizes, seed=4)
    pool = loader.pool(half, half.graph)
    prefill, decode = loader.cpu(half, isa=isa, pool=pool), loader.cpu(int4, isa=isa, pool=pool)
    prompt = kit.chunk(tokens=np.arange(40), first_position=0, blocks=[5, 6])
    token = kit.chunk(tokens=np.array([41]), first_position=40, blocks=[5, 6])
    kit.logits(prefill, kit.batch_of([prompt]))
    after_half = kit.logits(decode, kit.batch_of([token]))
    kit.logits(decode, kit.batch_of([prompt]))
    after_int4 = kit.logits(decode, kit.batch_of([token]))
    assert np.isfinite(after_half).all()
    assert (after_half != after_int4).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_unwritten_slots_do_not_matter(kit, loader, isa, dtype, garbage):
    model = kit.model("llama", Half(), kit.sizes())
    clean = loader.cpu(model, isa=isa, dtype=dtype)
    dirty = loader.cpu(model, isa=isa, dtype=dtype)
    dirty.kv.data.reshape(-1).view(np.float16)[:] = garbage
    expected = two_prompts_then_one_token(kit, clean)
    np.testing.assert_array_equal(two_prompts_then_one_token(kit, dirty), expected)
