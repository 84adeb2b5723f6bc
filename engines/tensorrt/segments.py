"""Where a network has to end because the ranks add up what they have: one segment between two sums. Pure.

With a layer for the sum (`add_dist_collective`), or on one rank, a graph is a single segment.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from edgellm.engines.graph import AllReduce, Attention, Embed, Graph, Linear, Op, Rope, TensorName, op_inputs
from edgellm.engines.tensorrt import interface


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """A tensor of rows that enters or leaves a segment: float32 [batch, chunk, width], tokens without the width."""

    tensor: TensorName
    name: str
    """Of the network's input or output."""
    width: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Ops that make one network."""

    ops: tuple[Op, ...]
    inputs: tuple[Crossing, ...]
    outputs: tuple[Crossing, ...]
    reduced: TensorName | None = None
    """The sum over ranks that follows; the last output is this rank's part of it."""


def whole_graph(graph: Graph) -> Segment:
    """The graph as one segment."""
    source = interface.TOKENS if graph.is_first_stage else interface.HIDDEN
    return Segment(
        ops=graph.ops,
        inputs=(Crossing(tensor=graph.input, name=source, width=graph.hidden_size),),
        outputs=(_result(graph),),
    )


def cut_at_sums(graph: Graph) -> tuple[Segment, ...]:
    """The graph's segments; each AllReduce ends one. A tensor that is read later crosses every border in between."""
    return tuple(_segments(graph))


def _segments(graph: Graph) -> Iterator[Segment]:
    widths = {graph.input: graph.hidden_size} | {op.out: output_width(op) for op in graph.ops}
    whole = whole_graph(graph)
    ends = [index for index, op in enumerate(graph.ops) if isinstance(op, AllReduce)]
    start, inputs = 0, whole.inputs
    for end in ends:
        reduce = graph.ops[end]
        assert isinstance(reduce, AllReduce)
        kept = [name for name in _read_after(graph, end) if _is_known(name, graph.ops[start:end], inputs)]
        outputs = tuple(_crossing(name, widths) for name in (*kept, reduce.x))
        yield Segment(ops=graph.ops[start:end], inputs=inputs, outputs=outputs, reduced=reduce.out)
        start, inputs = end + 1, tuple(_crossing(name, widths) for name in (*kept, reduce.out))
    yield Segment(ops=graph.ops[start:], inputs=inputs, outputs=whole.outputs)


def output_width(op: Op) -> int:
    """Columns of an op's result."""
    match op:
        case Embed():
            return op.hidden_size
        case Linear():
            return op.out_features
        case Rope() | Attention():
            return op.num_heads * op.head_dim
        case _:
            return op.size


def _read_after(graph: Graph, index: int) -> list[TensorName]:
    """Tensors that ops after `index` read, each once."""
    return list(dict.fromkeys(name for op in graph.ops[index + 1 :] for name in op_inputs(op)))


def _is_known(name: TensorName, ops: tuple[Op, ...], inputs: tuple[Crossing, ...]) -> bool:
    return any(op.out == name for op in ops) or any(crossing.tensor == name for crossing in inputs)


def _crossing(name: TensorName, widths: dict[TensorName, int]) -> Crossing:
    return Crossing(tensor=name, name=interface.rows(name), width=widths[name])


def _result(graph: Graph) -> Crossing:
    if graph.is_last_stage:
        return Crossing(tensor=graph.output, name=interface.LOGITS, width=graph.vocab_size)
    return Crossing(tensor=graph.output, name=interface.HIDDEN, width=graph.hidden_size)
