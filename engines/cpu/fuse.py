"""Which ops of a graph run as one: decided on the graph alone, without weights.

* Linears of the same input and precision become one, their output columns side by side (q, k, v; gate and up).
* An Add whose operand is a linear that nothing else reads becomes that linear's residual.
* Rope is done where attention writes the cache.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from edgellm.engines.graph import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Graph,
    Linear,
    Norm,
    Op,
    Precision,
    Rope,
    SelectRows,
    TensorName,
    op_inputs,
)


@dataclass(frozen=True, kw_only=True)
class FusedLinear:
    """Linears of one input; with `residual`, a single linear whose result is `out = x @ w.T + bias + residual`."""

    parts: tuple[Linear, ...]
    outs: tuple[TensorName, ...]
    """Of each part; the Add's where there is a residual."""
    residual: TensorName | None = None

    @property
    def x(self) -> TensorName:
        return self.parts[0].x

    @property
    def precision(self) -> Precision:
        return self.parts[0].precision


@dataclass(frozen=True, kw_only=True)
class FusedAttention:
    """Attention over q and k as they are before rotation."""

    attention: Attention
    q: TensorName
    k: TensorName
    q_rope: Rope | None
    k_rope: Rope | None


FusedOp: TypeAlias = FusedLinear | FusedAttention | Embed | Norm | Activation | Add | SelectRows | AllReduce


def fuse(graph: Graph) -> tuple[FusedOp, ...]:
    """The graph's ops in a valid order of execution, fused. ValueError names an op that this backend cannot run."""
    return tuple(_Fuser(graph).ops())


def fused_inputs(op: FusedOp) -> tuple[TensorName, ...]:
    """The tensors a fused op reads."""
    match op:
        case FusedLinear(residual=residual):
            return (op.x,) if residual is None else (op.x, residual)
        case FusedAttention():
            return (op.q, op.k, op.attention.v)
        case _:
            return op_inputs(op)


class _Fuser:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._writer: Mapping[TensorName, Op] = {op.out: op for op in graph.ops}
        self._readers = _readers(graph)
        self._residuals = self._find_residuals()
        self._groups = self._find_groups()

    def ops(self) -> Iterator[FusedOp]:
        absorbed = {linear.out for linear in self._residuals.values()}
        for op in self._graph.ops:
            match op:
                case Linear() if op.out in absorbed:
                    pass
                case Linear():
                    group = self._groups[op.x, op.precision]
                    if op is group[0]:
                        yield FusedLinear(parts=tuple(group), outs=tuple(part.out for part in group))
                case Add() if op.out in self._residuals:
                    yield self._with_residual(op)
                case Rope():
                    self._check_rope(op)
                case Attention():
                    yield self._attention(op)
                case AllReduce():
                    self._check_all_reduce(op)
                    yield op
                case _:
                    yield op

    def _find_residuals(self) -> dict[TensorName, Linear]:
        """By the Add's output: the linear it absorbs, the later one if both operands qualify."""
        found: dict[TensorName, Linear] = {}
        for op in self._graph.ops:
            if isinstance(op, Add) and op.a != op.b:
                candidates = [self._writer.get(name) for name in (op.a, op.b) if self._is_private(name)]
                linears = [op for op in candidates if isinstance(op, Linear)]
                if linears:
                    found[op.out] = linears[-1]
        return found

    def _find_groups(self) -> dict[tuple[TensorName, Precision], list[Linear]]:
        absorbed = {linear.out for linear in self._residuals.values()}
        groups: dict[tuple[TensorName, Precision], list[Linear]] = defaultdict(list)
        for op in self._graph.ops:
            if isinstance(op, Linear) and op.out not in absorbed:
                groups[op.x, op.precision].append(op)
        return groups

    def _with_residual(self, add: Add) -> FusedLinear:
        linear = self._residuals[add.out]
        other = add.a if add.b == linear.out else add.b
        return FusedLinear(parts=(linear,), outs=(add.out,), residual=other)

    def _attention(self, op: Attention) -> FusedAttention:
        q_rope, k_rope = (rope if isinstance(rope := self._writer.get(name), Rope) else None for name in (op.q, op.k))
        return FusedAttention(
            attention=op,
            q=op.q if q_rope is None else q_rope.x,
            k=op.k if k_rope is None else k_rope.x,
            q_rope=q_rope,
            k_rope=k_rope,
        )

    def _check_rope(self, op: Rope) -> None:
        """Rotation happens in place, so nothing else may read its input, and only attention its output."""
        if not self._is_private(op.x) or not self._is_private(op.out):
            raise ValueError(f"Rope {op.out!r}: the CPU backend needs its input and output to have one reader each")
        reader = self._readers[op.out][0]
        if not isinstance(reader, Attention) or op.out == reader.v:
            raise ValueError(f"Rope {op.out!r}: the CPU backend rotates only q and k of an attention")

    def _check_all_reduce(self, op: AllReduce) -> None:
        if not self._is_private(op.x):
            raise ValueError(f"AllReduce {op.out!r}: the CPU backend sums in place, so nothing else may read its input")

    def _is_private(self, name: TensorName) -> bool:
        return len(self._readers[name]) == 1 and name != self._graph.output


def _readers(graph: Graph) -> dict[TensorName, list[Op]]:
    readers: dict[TensorName, list[Op]] = defaultdict(list)
    for op in graph.ops:
        for name in op_inputs(op):
            readers[name].append(op)
    return readers
