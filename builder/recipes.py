"""The two versions of a model that a bundle carries: half precision for prefill, quantised for decode."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from edgellm.builder.context import BuildContext
from edgellm.builder.errors import BuildError
from edgellm.builder.files import text_sha256
from edgellm.builder.models import build_graph
from edgellm.builder.steps import StepResult, code_sha256
from edgellm.calib.recipe import QuantizeOptions, decode_precision
from edgellm.engines.graph import Embed, Graph, Int8, Linear, Op
from edgellm.engines.weights import WeightStore

_CODE: Final = ("edgellm.builder.checkpoint", "edgellm.builder.models", "edgellm.calib")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A graph and the weights that belong to it."""

    graph: Graph
    key: str
    """Identifies the weights: sha256 of all that they were made from."""
    load_weights: Callable[[], WeightStore]
    """Called only if an engine has to be compiled."""
    step: StepResult | None = None
    """How they came about, unless they are the checkpoint's own."""


def half_recipe(context: BuildContext) -> Recipe:
    """The checkpoint's own weights."""
    checkpoint = context.checkpoint
    return Recipe(
        graph=build_graph(checkpoint.config),
        key=text_sha256(f"{checkpoint.sha256} {code_sha256(*_CODE)}"),
        load_weights=lambda: checkpoint.weights,
    )


def decode_graph(context: BuildContext) -> Graph:
    """The whole model in the precisions that decode engines will have; known before anything is calibrated."""
    graph = build_graph(context.checkpoint.config)
    if context.options.precision_decode == "half":
        return graph
    return quantized_graph(graph, context.options.quantize)


def quantized_graph(graph: Graph, options: QuantizeOptions) -> Graph:
    """`graph` with linears and embedding as the decode recipe says."""

    def lower(op: Op) -> Op:
        match op:
            case Embed():
                return dataclasses.replace(op, precision=Int8())
            case Linear():
                return dataclasses.replace(op, precision=decode_precision(op, graph, options))
            case _:
                return op

    return dataclasses.replace(graph, ops=tuple(map(lower, graph.ops)))


def decode_recipe(context: BuildContext) -> Recipe:
    """Quantised weights from the cache, or quantised now; the checkpoint's own where decode is in half precision."""
    if context.options.precision_decode == "half":
        return half_recipe(context)
    raise BuildError("int4 decode engines need calibration, which is not here yet")
