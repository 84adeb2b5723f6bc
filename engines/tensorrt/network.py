"""From a graph to finished networks, one per segment, ready to build or to evaluate."""

from dataclasses import dataclass
from typing import Any

from edgellm.engines.graph import AllReduce, Graph, check
from edgellm.engines.tensorrt.api import Api
from edgellm.engines.tensorrt.attention import AttentionForm, FusedAttention, PrimitiveAttention
from edgellm.engines.tensorrt.emitter import Emitter
from edgellm.engines.tensorrt.interface import Bounds
from edgellm.engines.tensorrt.layers import Layers
from edgellm.engines.tensorrt.linear import WeightWriter
from edgellm.engines.tensorrt.segments import Segment, cut_at_sums, whole_graph
from edgellm.engines.tensorrt.step import Step
from edgellm.engines.weights import WeightStore


@dataclass(frozen=True, kw_only=True, eq=False)
class EmittedNetwork:
    """A finished network; it points into the memory of `layers.constants`."""

    builder: Any
    network: Any
    layers: Layers
    segment: Segment
    bounds: Bounds
    int4_weights: int
    """Elements of its int4 linears."""
    int4_bytes: int
    """Of everything these keep."""


def segments_of(graph: Graph, api: Api) -> tuple[Segment, ...]:
    """One, unless ranks have to add up and the module has no layer for it. Raises ValueError for a broken graph."""
    check(graph)
    is_sharded = any(isinstance(op, AllReduce) for op in graph.ops)
    return cut_at_sums(graph) if is_sharded and not api.features.collective else (whole_graph(graph),)


def emit(segment: Segment, weights: WeightStore, *, bounds: Bounds, api: Api, world: int = 1) -> EmittedNetwork:
    """Write one segment. The attention layers are used where the module has them.

    Raises ValueError for a weight that does not fit its op, TensorRtError for a layer that the module refuses.
    """
    builder = api.trt.Builder(api.logger())
    network = builder.create_network(_strongly_typed(api))
    layers = Layers(api, network)
    step = Step(layers, bounds)
    writer = WeightWriter(layers, weights)
    form: AttentionForm = PrimitiveAttention(step)
    if api.features.attention:
        form = FusedAttention(step, knows_lengths=api.features.lengths)
    Emitter(step, writer, form, world).emit(segment)
    return EmittedNetwork(
        builder=builder,
        network=network,
        layers=layers,
        segment=segment,
        bounds=bounds,
        int4_weights=writer.linear_weights,
        int4_bytes=writer.linear_bytes,
    )


def _strongly_typed(api: Api) -> int:
    """TensorRT 11 and RTX know nothing else; 10 has to be told."""
    return 1 << int(api.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
