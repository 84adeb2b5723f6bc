"""A quantised model on disk: all arrays in `weights.safetensors`, the graph and the weights' forms in `graph.json`."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgellm.engines.graph import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Embed,
    Graph,
    Half,
    Int4,
    Int8,
    Linear,
    Norm,
    Op,
    Precision,
    Rope,
    SelectRows,
    WeightName,
)
from edgellm.engines.weights import Int4Weight, Int8Weight, Weight

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

_ARRAYS: Final = "weights.safetensors"
_INDEX: Final = "graph.json"
_OPS: Final[dict[str, Callable[..., Op]]] = {
    cls.__name__: cls for cls in (Embed, Norm, Linear, Rope, Attention, Activation, Add, SelectRows, AllReduce)
}
_PRECISIONS: Final[dict[str, Callable[..., Precision]]] = {"half": Half, "int8": Int8, "int4": Int4}


class StoredWeightsError(ValueError):
    """A folder of quantised weights cannot be read; the message says why."""


def save_quantized(path: Path, graph: Graph, weights: Mapping[WeightName, Weight]) -> None:
    """Write both files into the folder `path`, made if it is missing. Equal inputs give equal bytes."""
    path.mkdir(parents=True, exist_ok=True)
    arrays: Arrays = {}
    for name, weight in weights.items():
        arrays |= {f"{name}:{part}": array for part, array in _parts(weight).items()}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path / _ARRAYS)
    group_sizes = {name: weight.group_size for name, weight in weights.items() if isinstance(weight, Int4Weight)}
    index = {"graph": _graph_fields(graph), "weights": list(weights), "group_sizes": group_sizes}
    (path / _INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=1))


def load_quantized(path: Path) -> tuple[Graph, dict[WeightName, Weight]]:
    """What `save_quantized` wrote. Raises StoredWeightsError if a file is missing, damaged or of another shape."""
    try:
        index = msgspec.json.decode((path / _INDEX).read_bytes())
        arrays = load_file(path / _ARRAYS)
        names = [WeightName(name) for name in index["weights"]]
        weights = {name: _weight(name, arrays, index["group_sizes"].get(name)) for name in names}
        return _graph(index["graph"]), weights
    except (OSError, SafetensorError, msgspec.DecodeError, KeyError, TypeError) as error:
        raise StoredWeightsError(f"{path} does not hold quantised weights, remove it: {error}") from error


def _parts(weight: Weight) -> Arrays:
    match weight:
        case Int4Weight():
            parts: Arrays = {
                "q": weight.q,
                "scale": weight.scale,
                "outlier_columns": weight.outlier_columns,
                "outlier_weight": weight.outlier_weight,
            }
            return parts if weight.input_scale is None else parts | {"input_scale": weight.input_scale}
        case Int8Weight():
            return {"q": weight.q, "scale": weight.scale}
        case _:
            return {"": weight}


def _weight(name: WeightName, arrays: Arrays, group_size: int | None) -> Weight:
    if f"{name}:" in arrays:
        return arrays[f"{name}:"]
    if group_size is None:
        return Int8Weight(q=arrays[f"{name}:q"], scale=arrays[f"{name}:scale"])
    return Int4Weight(
        q=arrays[f"{name}:q"],
        scale=arrays[f"{name}:scale"],
        group_size=group_size,
        input_scale=arrays.get(f"{name}:input_scale"),
        outlier_columns=arrays[f"{name}:outlier_columns"],
        outlier_weight=arrays[f"{name}:outlier_weight"],
    )


def _graph_fields(graph: Graph) -> dict[str, Any]:
    """The graph's fields, each op with the name of its class."""
    ops = [{"op": type(op).__name__, **dataclasses.asdict(op)} for op in graph.ops]
    return {**dataclasses.asdict(graph), "ops": ops}


def _graph(fields: dict[str, Any]) -> Graph:
    return Graph(**{**fields, "ops": tuple(map(_op, fields["ops"]))})


def _op(fields: dict[str, Any]) -> Op:
    own: dict[str, Any] = {name: value for name, value in fields.items() if name != "op"}
    if "inv_freq" in own:
        own["inv_freq"] = tuple(own["inv_freq"])
    if "precision" in own:
        own["precision"] = _PRECISIONS[own["precision"]["kind"]](**own["precision"])
    return _OPS[fields["op"]](**own)
