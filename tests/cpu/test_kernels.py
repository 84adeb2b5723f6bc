"""Each kernel against its plain twin, at odd sizes, through executors of one or two ops."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest

from edgellm.engines.cpu import pack
from edgellm.engines.cpu._native import Executor
from edgellm.engines.cpu.pack_linear import INT16_MAX

KV_HEADS, HEAD_DIM, GROUP, NUM_BLOCKS = 2, 20, 3, 24
BLOCK_TABLE = np.random.default_rng(0).permutation(NUM_BLOCKS).astype(np.int32)


@dataclass
class Memory:
    """Arena and weights of a tiny executor; offsets are in bytes."""

    arena: np.ndarray = field(default_factory=lambda: np.zeros(1 << 22, np.uint8))
    weights: list = field(default_factory=list)
    arena_used: int = 0

    def rows(self, count, width):
        """(offset, stride) of a new float32 [count, width], with some room between the rows."""
        offset, stride = self.arena_used, width + 5
        self.arena_used += -(-4 * count * stride // 64) * 64
        return offset, stride

    def view(self, rows, count, width):
        offset, stride = rows
        return self.arena[offset : offset + 4 * count * stride].view(np.float32).reshape(count, stride)[:, :width]

    def segment(self, values):
        """Offset of a weight, or None."""
        if values is None:
            return None
        offset = sum(part.nbytes for part in self.weights)
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        self.weights.append(np.pad(data, (0, -len(data) % 64)))
        return offset

    def executor(self, isa, rows, *, dtype="fp16", pool=None):
        scales = 4 * 32 * KV_HEADS if dtype == "int8" else 0
        block_bytes = (2 if dtype == "int8" else 4) * 32 * KV_HEADS * HEAD_DIM + scales
        weights = np.concatenate([*self.weights, np.zeros(64, np.uint8)])
        return Executor(
            isa=isa,
            threads=2,
            max_rows=rows,
            max_sequences=rows,
            arena=self.arena,
            weights=weights,
            pool=np.zeros(NUM_BLOCKS * block_bytes, np.uint8) if pool is None else pool,
            num_blocks=NUM_BLOCKS,
            block_bytes=block_bytes,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            group=GROUP,
        )


def run(executor, rows, *, tokens=None, position=0):
    """One step of one sequence."""
    executor.run(
        tokens=np.zeros(rows, np.int32) if tokens is None else tokens,
        hidden=None,
        row_starts=np.array([0, rows], np.int32),
        first_positions=np.array([position], np.int32),
        block_tables=BLOCK_TABLE[None],
        logit_rows=np.zeros(0, np.int32),
    )


def both(isa, compute):
    """What the instruction set and the plain twin compute."""
    return compute(isa), compute("reference")


def bf16_exact(values):
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("form", ["half", "int8"])
@pytest.mark.parametrize("channels", [1, 30, 67])
def test_embed(isa, form, channels):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 37, 11).astype(np.int32)
    q = rng.integers(-127, 128, (37, channels)).astype(np.int8)
    scale = pack.pad_columns(rng.uniform(0.1, 1, 37))
    table = pack.pack_half(random(37, channels), 96) if form == "half" else pack.pack_int8(q, 128)

    def compute(name):
        memory = Memory()
        out = memory.rows(11, channels)
        places = {"table": memory.segment(table), "scale": memory.segment(None if form == "half" else scale)}
        executor = memory.executor(name, 11)
        padded = 96 if form == "half" else 128
        executor.embed(form=form, out=out, channels=channels, padded_channels=padded, **places)
        run(executor, 11, tokens=tokens)
        return memory.view(out, 11, channels)

    np.testing.assert_array_equal(*both(isa, compute))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("size", [1, 15, 64, 173])
def test_norm(isa, kind, size):
    weight, bias = random(size, seed=1), random(size, seed=2)

    def compute(name):
        memory = Memory()
        x, out = memory.rows(5, size), memory.rows(5, size)
        memory.view(x, 5, size)[:] = random(5, size) * 3 + 1
        places = {"weight": memory.segment(weight), "bias": memory.segment(bias if kind == "layer" else None)}
        executor = memory.executor(name, 5)
        executor.norm(kind=kind, x=x, out=out, size=size, eps=1e-3, **places)
        run(executor, 5)
        return memory.view(out, 5, size)

    np.testing.assert_allclose(*both(isa, compute), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activate(isa, kind, gated):
    size = 203
    x = np.concatenate([random(3, 100) * 4, np.tile(np.linspace(-100, 100, 103, dtype=np.float32), (3, 1))], axis=1)

    def compute(name):
        memory = Memory()
        places = {"x": memory.rows(3, size), "out": memory.rows(3, size), "up": memory.rows(3, size) if gated else None}
        memory.view(places["x"], 3, size)[:] = x
        if gated:
            memory.view(places["up"], 3, size)[:] = random(3, size, seed=9)
        executor = memory.executor(name, 3)
        executor.activate(kind=kind, size=size, **places)
        run(executor, 3)
        return memory.view(places["out"], 3, size)

    np.testing.assert_allclose(*both(isa, compute), rtol=2e-6, atol=2e-6)


def test_add(isa):
    def compute(name):
        memory = Memory()
        a, b, out = (memory.rows(7, 45) for _ in range(3))
        memory.view(a, 7, 45)[:], memory.view(b, 7, 45)[:] = random(7, 45), random(7, 45, seed=1)
        executor = memory.executor(name, 7)
        executor.add(a=a, b=b, out=out, size=45)
        run(executor, 7)
        return memory.view(out, 7, 45)

    np.testing.assert_array_equal(*both(isa, compute))


@dataclass(frozen=True)
class LinearCase:
    """A linear and its input; None where the form has no such weight."""

    form: str
    columns: int
    channels: int
    padded_channels: int
    group_size: int
    weight: np.ndarray
    group_scale: np.ndarray | None = None
    column_scale: np.ndarray | None = None
    outlier_columns: np.ndarray | None = None
    outlier_weight: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    quant_max: int = 127

    @property
    def input_form(self):
        return {"half": "half", "int8": "int8", "int8x16": "int16", "int4": "int8"}.get(self.form, "float")


def linear_case(form, columns, channels, quant_max=127):
    rng = np.random.default_rng(columns * channels)
    if form == "half":
        padded = pack.round_up(channels, 32)
        weight = pack.pack_half(random(columns, channels), padded)
        return LinearCase(form, columns, channels, padded, padded, weight)
    if form.startswith("int8"):
        padded = pack.round_up(channels, 64)
        q = rng.integers(-127, 128, (columns, channels)).astype(np.int8)
        scale = pack.pad_columns(rng.uniform(0.001, 0.01, columns))
        return LinearCase(
            form,
            columns,
            channels,
            padded,
            padded,
            pack.pack_int8(q, padded),
            column_scale=scale,
            quant_max=127 if form == "int8" else INT16_MAX,
        )
    group = 8 if channels % 16 else 16
    q = rng.integers(-8, 8, (columns, channels)).astype(np.int8)
    scale = (rng.uniform(1e-7, 10, (columns, channels // group)) ** 3).astype(np.float32)
    group_scale, column_scale = pack.pack_group_scales(scale)
    outliers = np.sort(rng.choice(channels, 3, replace=False)).astype(np.int32)
    input_scale = rng.uniform(0.5, 2, channels).astype(np.float32)
    input_scale[outliers] = 0
    return LinearCase(
        form,
        columns,
        channels,
        channels,
        group,
        pack.pack_int4(q),
        group_scale,
        column_scale,
        outliers,
        pack.pack_half(random(columns, 3), 4),
        input_scale,
        quant_max,
    )


def linear_input(case, rows):
    return bf16_exact(random(rows, case.channels, seed=rows))


def compute_linear(case, inputs, name, *, bias=False, residual=False):
    """The conversion of inputs [rows, channels], then the linear: float32 [rows, columns]."""
    rows = len(inputs)
    memory = Memory()
    outliers, padded_outliers = (0, 0) if case.outlier_columns is None else (3, 4)
    channel_bytes = {"int8": 1, "int16": 2}.get(case.input_form, 4)
    sums = {"int8": case.padded_channels // case.group_size, "int16": 2}.get(case.input_form, 0)
    sums_at = case.padded_channels * channel_bytes
    outliers_at = sums_at + 4 * sums
    scale_at = outliers_at + 4 * padded_outliers
    row_bytes = pack.round_up(scale_at + 4, 64)
    x, out, added = (memory.rows(rows, width) for width in (case.channels, case.columns, case.columns))
    records = (memory.rows(rows, row_bytes // 4)[0], row_bytes, sums_at, outliers_at, scale_at)
    memory.view(x, rows, case.channels)[:] = inputs
    memory.view(added, rows, case.columns)[:] = random(rows, case.columns, seed=7)
    names = ("weight", "group_scale", "column_scale", "outlier_weight")
    places = {key: memory.segment(getattr(case, key)) for key in names}
    bias_at = memory.segment(pack.pad_columns(random(case.columns, seed=5)) if bias else None)
    prepared = {key: memory.segment(getattr(case, key)) for key in ("input_scale", "outlier_columns")}
    executor = memory.executor(name, rows)
    executor.prepare(
        form=case.input_form,
        x=x,
        out=records,
        channels=case.channels,
        padded_channels=case.padded_channels,
        outliers=outliers,
        padded_outliers=padded_outliers,
        group_size=case.group_size,
        quant_max=case.quant_max,
        **prepared,
    )
    executor.linear(
        form=case.form,
        x=records,
        out=out,
        bias=bias_at,
        padded_channels=case.padded_channels,
        group_size=case.group_size,
        padded_outliers=padded_outliers,
        columns=case.columns,
        residual=added if residual else None,
        **places,
    )
    run(executor, rows)
    return memory.view(out, rows, case.columns)


@pytest.mark.parametrize("form", ["half", "int8", "int8x16", "int4", "int4_float"])
@pytest.mark.parametrize(("columns", "channels"), [(1, 8), (17, 24), (33, 64), (100, 176), (160, 48)])
def test_linear(isa, form, columns, channels):
    """Every count of rows up to two tiles and a bit, with and without bias and residual."""
    case = linear_case(form, columns, channels)
    options = itertools.cycle(itertools.product((False, True), repeat=2))
    for rows, (bias, residual) in zip([*range(1, 20), 31, 33, 50], options, strict=False):
        inputs = linear_input(case, rows)
        found, expected = both(isa, lambda name: compute_linear(case, inputs, name, bias=bias, residual=residual))  # noqa: B023
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found / scale, expected / scale, atol=3e-6, err_msg=f"{rows} rows")


@pytest.mark.parametrize("form", ["half", "int8", "int8x16", "int4", "int4_float"])
@pytest.mark.parametrize(("columns", "channels"), [(70, 72), (33, 4400)])
def test_linear_of_a_row_does_not_depend_on_its_company(isa, form, columns, channels):
    """Few and many rows take different ways to the same bits; 4400 channels are unpacked in three parts."""
    case = linear_case(form, columns, channels)
    inputs = linear_input(case, 70)
    together = compute_linear(case, inputs, isa).copy()
    for first, count in ((0, 1), (3, 2), (7, 4), (16, 13), (31, 17), (69, 1)):
        some = compute_linear(case, inputs[first : first + count], isa)
        assert some.tobytes() == together[first : first + count].tobytes(), f"{count} rows from {first}"


def test_tiny_outliers_do_not_depend_on_company(isa):
    """Tile products flush denormals: sums of outliers must do so with and without tiles."""
    case = linear_case("int4", 70, 64)
    inputs = linear_input(case, 20) * np.float32(2.0**-110)
    together = compute_linear(case, inputs, isa).copy()
    assert compute_linear(case, inputs[4:5], isa).tobytes() == together[4:5].tobytes()


@pytest.mark.parametrize("quant_max", [7, 127])
def test_quantised_input(isa, quant_max):
    case = linear_case("int4", 16, 48, quant_max)
    found, expected = both(isa, lambda name: compute_linear(case, linear_input(case, 5), name))
    np.testing.assert_allclose(found, expected, atol=3e-6 * np.abs(expected).max())


def test_input_of_zeros(isa):
    case = linear_case("int8", 20, 30)
    memory = Memory()
    x, out, records = memory.rows(1, 30), memory.rows(1, 20), (memory.rows(1, 64)[0], 192, 64, 68, 68)
    executor_weights = {key: memory.segment(getattr(case, key)) for key in ("weight", "column_scale")}
    executor = memory.executor(isa, 1)
    shape = {"padded_channels": 64, "group_size": 64, "padded_outliers": 0}
    nothing = {"input_scale": None, "outlier_columns": None}
    executor.prepare(form="int8", x=x, out=records, channels=30, outliers=0, quant_max=127, **shape, **nothing)
    absent = {"group_scale": None, "outlier_weight": None, "bias": None, "residual": None}
    executor.linear(form="int8", x=records, out=out, columns=20, **executor_weights, **shape, **absent)
    run(executor, 1)
    assert not memory.view(out, 1, 20).any()


def attention_memory(rows):
    memory = Memory()
    heads = KV_HEADS * GROUP
    q, out = memory.rows(rows, heads * HEAD_DIM), memory.rows(rows, heads * HEAD_DIM)
    k, v = memory.rows(rows, KV_HEADS * HEAD_DIM), memory.rows(rows, KV_HEADS * HEAD_DIM)
    for seed, (view, width) in enumerate(((q, heads), (k, KV_HEADS), (v, KV_HEADS))):
        memory.view(view, rows, width * HEAD_DIM)[:] = 2 * random(rows, width * HEAD_DIM, seed=seed)
    return memory, q, k, v, out


def pool_of(dtype):
    scales = 4 * 32 * KV_HEADS if dtype == "int8" else 0
    return np.zeros(NUM_BLOCKS * ((2 if dtype == "int8" else 4) * 32 * KV_HEADS * HEAD_DIM + scales), np.uint8)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("rotary_dim", [0, 6, 20])
@pytest.mark.parametrize(("rows", "position"), [(1, 0), (37, 30), (5, 155)])
def test_store_kv(isa, dtype, rotary_dim, rows, position):
    inv_freq = tuple(100.0 ** (-i / rotary_dim) for i in range(0, rotary_dim, 2)) if rotary_dim else ()

    def compute(name):
        memory, q, k, v, _ = attention_memory(rows)
        table = memory.segment(pack.rotation_table(inv_freq, 1.5, 160)) if rotary_dim else None
        pool = pool_of(dtype)
        executor = memory.executor(name, rows, dtype=dtype, pool=pool)
        rotations = {"q_rotation": table, "k_rotation": table, "q_rotary_dim": rotary_dim, "k_rotary_dim": rotary_dim}
        executor.store_kv(dtype=dtype, layer=0, q=q, k=k, v=v, num_heads=KV_HEADS * GROUP, **rotations)
        run(executor, rows, position=position)
        return memory.view(q, rows, KV_HEADS * GROUP * HEAD_DIM), pool

    (found_q, found), (expected_q, expected) = both(isa, compute)
    np.testing.assert_allclose(found_q, expected_q, rtol=1e-5, atol=1e-5)
    values = NUM_BLOCKS, -1
    if dtype == "fp16":
        np.testing.assert_allclose(found.view(np.float16), expected.view(np.float16), rtol=2e-3, atol=1e-3)
        return
    split = 2 * 32 * KV_HEADS * HEAD_DIM
    found, expected = found.reshape(values), expected.reshape(values)
    steps = found[:, :split].view(np.int8).astype(int) - expected[:, :split].view(np.int8)
    assert np.abs(steps).max() <= 1
    np.testing.assert_allclose(
        found[:, split:].copy().view(np.float16), expected[:, split:].copy().view(np.float16), rtol=2e-3
    )


def random_pool(dtype):
    rng = np.random.default_rng(4)
    pool = pool_of(dtype)
    if dtype == "fp16":
        pool.view(np.float16)[:] = rng.standard_normal(len(pool) // 2)
        return pool
    pool[:] = rng.integers(0, 256, len(pool))
    scales = pool.reshape(NUM_BLOCKS, -1)[:, 2 * 32 * KV_HEADS * HEAD_DIM :]
    scales[:] = rng.uniform(0.001, 0.02, (NUM_BLOCKS, scales.shape[1] // 2)).astype(np.float16).view(np.uint8)
    return pool


def attended(isa, dtype, pool, queries, position):
    """Attention of rows of queries [rows, heads * head_dim] from `position` on."""
    rows, width = queries.shape
    memory = Memory()
    q, out = memory.rows(rows, width), memory.rows(rows, width)
    memory.view(q, rows, width)[:] = queries
    executor = memory.executor(isa, rows, dtype=dtype, pool=pool)
    executor.attend(dtype=dtype, layer=0, q=q, out=out, num_heads=KV_HEADS * GROUP, scale=0.3)
    run(executor, rows, position=position)
    return memory.view(out, rows, width).copy()


def random_queries(rows):
    return 2 * random(rows, KV_HEADS * GROUP * HEAD_DIM)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize(
    ("rows", "position"),
    [(1, 0), (1, 31), (1, 64), (33, 0), (70, 17), (3, 157), (1, 255), (1, 256), (5, 600), (90, 220), (100, 500)],
)
def test_attend(isa, dtype, rows, position):
    """Within, up to and over the ends of blocks and segments; few and many rows."""
    pool, queries = random_pool(dtype), random_queries(rows)
    found, expected = both(isa, lambda name: attended(name, dtype, pool, queries, position))
    if isa == "amx":  # multiplies in bf16
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
        return
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("position", [0, 250, 520])
def test_attention_of_a_row_does_not_depend_on_its_company(isa, dtype, position):
    """One row's context is computed in segments, by two threads; many rows walk it whole."""
    pool, queries = random_pool(dtype), random_queries(95)
    together = attended(isa, dtype, pool, queries, position)
    for row in (0, 1, 15, 16, 84, 85, 94):
        alone = attended(isa, dtype, pool, queries[row : row + 1], position + row)
        assert alone[0].tobytes() == together[row].tobytes()


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("garbage", [np.inf, np.nan])
def test_values_of_later_rows_do_not_leak(isa, dtype, garbage):
    """A later row of the same step may have overflowed."""
    queries, position, bad = random_queries(40), 230, 258
    clean = attended(isa, dtype, random_pool(dtype), queries, position)
    pool = random_pool(dtype)
    block = pool.reshape(NUM_BLOCKS, -1)[BLOCK_TABLE[bad // 32]].view(np.float16)
    slots = {"fp16": (2, 32, -1), "int8": (2, 32, KV_HEADS)}[dtype]
    kept = block if dtype == "fp16" else block[-2 * 32 * KV_HEADS :]  # int8's infinities are in its scales
    kept.reshape(slots)[:, bad % 32] = garbage
    dirty = attended(isa, dtype, pool, queries, position)
    assert dirty[: bad - position].tobytes() == clean[: bad - position].tobytes()
    assert not np.isfinite(dirty[bad - position :]).any()
