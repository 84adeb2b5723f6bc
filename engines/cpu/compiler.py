"""Graph and weights -> `plan.json` and `weights.bin`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, assert_never

import msgspec

from edgellm.engines.cpu import pack, plan
from edgellm.engines.cpu.buffers import BufferPlanner
from edgellm.engines.cpu.fuse import FusedAttention, FusedLinear, FusedOp, fuse, fused_inputs
from edgellm.engines.cpu.pack_linear import PackedLinear, Tables, check_matrix, pack_bias, pack_linear, pack_table
from edgellm.engines.cpu.weights_file import CountedWeights, WeightsFile
from edgellm.engines.graph import (
    HIDDEN,
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Graph,
    Norm,
    Rope,
    SelectRows,
    TensorName,
    check,
    op_weights,
)
from edgellm.engines.kv import KvContract
from edgellm.engines.spec import EngineLimits
from edgellm.engines.weights import WeightStore

PLAN_FILE: Final = "plan.json"
WEIGHTS_FILE: Final = "weights.bin"
MAX_GROUP: Final = 64
"""Query heads per KV head that the attention kernel's scratch memory holds."""


def compile_engine(
    graph: Graph,
    weights: WeightStore,
    *,
    contract: KvContract,
    limits: EngineLimits,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `plan.json` and `weights.bin` into `folder`; equal inputs give equal bytes.

    Each weight is looked up once and packed alone. `progress(done, total)` is called after each weight that was read.
    Raises ValueError for a graph this backend cannot run, or a weight that does not fit its op.
    """
    check(graph)
    _check_attentions(graph, contract)
    total = len({name for op in graph.ops for name in op_weights(op)})
    with (folder / WEIGHTS_FILE).open("wb") as file:
        compiler = _Compiler(graph, CountedWeights(weights, total, progress), WeightsFile(file), limits.max_seq_len)
        compiled = compiler.compile(contract)
    (folder / PLAN_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(compiled), indent=1))


def _check_attentions(graph: Graph, contract: KvContract) -> None:
    for op in graph.ops:
        if isinstance(op, Attention):
            _check_attention(op, contract)


def _check_attention(op: Attention, contract: KvContract) -> None:
    if (op.kv_heads, op.head_dim) != (contract.kv_heads, contract.head_dim):
        raise ValueError(
            f"layer {op.layer} has {op.kv_heads} KV heads of {op.head_dim}, "
            f"the KV contract has {contract.kv_heads} of {contract.head_dim}"
        )
    if op.head_dim % 4 or op.num_heads % op.kv_heads or op.num_heads // op.kv_heads > MAX_GROUP:
        raise ValueError(
            f"layer {op.layer}: {op.num_heads} heads over {op.kv_heads} KV heads of {op.head_dim}; the CPU backend "
            f"needs a head size that is a multiple of 4, and 1 to {MAX_GROUP} heads per KV head"
        )


class _Compiler:
    """Emits plan ops one fused op after the other; `self._at` is the number of the op being emitted."""

    def __init__(self, graph: Graph, weights: CountedWeights, file: WeightsFile, max_seq_len: int) -> None:
        self._graph = graph
        self._weights = weights
        self._file = file
        self._max_seq_len = max_seq_len
        self._buffers = BufferPlanner()
        self._views: dict[TensorName, plan.View] = {}
        self._tables: Tables = {}
        self._ops: list[plan.PlanOp] = []

    def compile(self, contract: KvContract) -> plan.Plan:
        if not self._graph.is_first_stage:
            self._ops.append(plan.InputOp(out=self._new(HIDDEN, self._graph.hidden_size)))
        for op in fuse(self._graph):
            self._emit(op)
        output = self._read(self._graph.output)
        groups = [op.num_heads // op.kv_heads for op in self._graph.ops if isinstance(op, Attention)]
        return plan.Plan(
            backend_version=plan.BACKEND_VERSION,
            weights_bytes=self._file.size,
            hidden_size=self._graph.hidden_size,
            vocab_size=self._graph.vocab_size,
            num_layers=self._graph.num_layers,
            max_seq_len=self._max_seq_len,
            contract=contract,
            group=max(groups, default=1),
            buffers=self._buffers.place(plan.rounds(self._ops)),
            ops=tuple(self._ops),
            output=output,
            is_first_stage=self._graph.is_first_stage,
            is_last_stage=self._graph.is_last_stage,
        )

    def _emit(self, op: FusedOp) -> None:
        match op:
            case FusedLinear():
                self._linear(op)
            case FusedAttention():
                self._attention(op)
            case Embed():
                self._embed(op)
            case Norm():
                self._norm(op)
            case Activation():
                up = None if op.up is None else self._read(op.up)
                self._ops.append(
                    plan.ActivateOp(kind=op.kind, x=self._read(op.x), up=up, out=self._new(op.out, op.size))
                )
            case Add():
                a, b = self._read(op.a), self._read(op.b)
                self._ops.append(plan.AddOp(a=a, b=b, out=self._new(op.out, op.size)))
            case SelectRows():
                self._ops.append(plan.SelectOp(x=self._read(op.x), out=self._new(op.out, op.size)))
            case AllReduce():
                self._views[op.out] = self._read(op.x)
                self._ops.append(plan.AllReduceOp(x=self._views[op.out]))
            case _:
                assert_never(op)

    def _embed(self, op: Embed) -> None:
        if op.weight not in self._tables:
            weight = self._weights.take(op.weight)
            check_matrix(op.weight, weight, (op.vocab_size, op.hidden_size), op.precision)
            self._tables[op.weight] = pack_table([weight], self._file)
        table = self._tables[op.weight]
        self._ops.append(
            plan.EmbedOp(
                out=self._new(op.out, op.hidden_size),
                form="half" if table.scale is None else "int8",
                table=table.weight,
                scale=table.scale,
                channels=op.hidden_size,
                padded_channels=table.padded_channels,
            )
        )

    def _norm(self, op: Norm) -> None:
        self._ops.append(
            plan.NormOp(
                kind=op.kind,
                x=self._read(op.x),
                out=self._new(op.out, op.size),
                weight=self._file.append(self._weights.vector(op.weight, op.size)),
                bias=None if op.bias is None else self._file.append(self._weights.vector(op.bias, op.size)),
                eps=op.eps,
            )
        )

    def _linear(self, op: FusedLinear) -> None:
        packed = pack_linear(op, self._weights, self._file, self._tables)
        bias = pack_bias(op, self._weights, self._file)
        records = self._prepare(op.x, packed)
        self._buffers.touch(records.buffer, len(self._ops))
        residual = None if op.residual is None else self._read(op.residual)
        self._ops.append(
            plan.LinearOp(
                form=packed.form,
                x=records,
                out=self._new_side_by_side(op.outs, [part.out_features for part in op.parts]),
                weight=packed.weight,
                group_scale=packed.group_scale,
                column_scale=packed.column_scale,
                outlier_weight=packed.outlier_weight,
                bias=bias,
                residual=residual,
            )
        )

    def _prepare(self, x: TensorName, packed: PackedLinear) -> plan.Records:
        """Emit the conversion of a linear's input."""
        view = self._read(x)
        records = self._records(packed)
        self._ops.append(
            plan.PrepareOp(
                form=_input_form(packed),
                x=view,
                out=records,
                input_scale=packed.input_scale,
                outlier_columns=packed.outlier_columns,
                quant_max=packed.quant_max,
            )
        )
        return records

    def _records(self, packed: PackedLinear) -> plan.Records:
        """Rooms of a record; a half-precision value gets 4 bytes, for machines that widen it."""
        padded_outliers = pack.round_up(packed.outliers, 2)
        channel_bytes, sums = {
            "half": (4, 0),
            "float": (4, 0),
            "int8": (1, packed.padded_channels // packed.group_size),
            "int16": (2, 2),
        }[_input_form(packed)]
        sums_at = channel_bytes * packed.padded_channels
        outliers_at = sums_at + 4 * sums
        scale_at = outliers_at + 4 * padded_outliers
        return plan.Records(
            buffer=self._buffers.new(scale_at + 4, len(self._ops)),
            channels=packed.channels,
            padded_channels=packed.padded_channels,
            outliers=packed.outliers,
            padded_outliers=padded_outliers,
            group_size=packed.group_size,
            sums_at=sums_at,
            outliers_at=outliers_at,
            scale_at=scale_at,
        )

    def _attention(self, op: FusedAttention) -> None:
        q, k, v = (self._read(name) for name in fused_inputs(op))
        layer = op.attention.layer - self._graph.first_layer
        heads = op.attention.num_heads
        self._ops.append(
            plan.StoreKvOp(
                layer=layer,
                q=q,
                k=k,
                v=v,
                num_heads=heads,
                q_rotation=self._rotation(op.q_rope),
                q_rotary_dim=0 if op.q_rope is None else op.q_rope.rotary_dim,
                k_rotation=self._rotation(op.k_rope),
                k_rotary_dim=0 if op.k_rope is None else op.k_rope.rotary_dim,
            )
        )
        self._buffers.touch(q.buffer, len(self._ops))
        out = self._new(op.attention.out, heads * op.attention.head_dim)
        self._ops.append(plan.AttendOp(layer=layer, q=q, out=out, num_heads=heads, scale=op.attention.scale))

    def _rotation(self, rope: Rope | None) -> plan.Segment | None:
        if rope is None:
            return None
        key = (rope.inv_freq, rope.attention_factor)
        known = self._file.known(key)
        if known is not None:
            return known
        return self._file.append(pack.rotation_table(*key, self._max_seq_len), key)

    def _read(self, name: TensorName) -> plan.View:
        view = self._views[name]
        self._buffers.touch(view.buffer, len(self._ops))
        return view

    def _new(self, name: TensorName, width: int) -> plan.View:
        return self._new_side_by_side([name], [width])

    def _new_side_by_side(self, names: Sequence[TensorName], widths: Sequence[int]) -> plan.View:
        """A buffer that the next op writes, and a view of it per tensor."""
        whole = plan.View(buffer=self._buffers.new(4 * sum(widths), len(self._ops)), column=0, width=sum(widths))
        column = 0
        for name, width in zip(names, widths, strict=True):
            self._views[name] = plan.View(buffer=whole.buffer, column=column, width=width)
            column += width
        return whole


def _input_form(packed: PackedLinear) -> Literal["half", "float", "int8", "int16"]:
    match packed.form:
        case "half":
            return "half"
        case "int8" | "int4":
            return "int8"
        case "int8x16":
            return "int16"
        case "int4_float":
            return "float"
