"""A checkpoint's tensors under our weight names, checked against the graph that will use them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from edgellm.builder.checkpoint.errors import DOWNLOAD_AGAIN, CheckpointError
from edgellm.builder.models import ARCHITECTURES, ModelConfig, build_graph, source_of, weight_shapes
from edgellm.calib.recipe import LinearSource
from edgellm.engines.graph import WeightName
from edgellm.engines.weights import FloatArray


class TensorFile(Protocol):
    """Tensors by their names in the Hugging Face state dict."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape, or None if there is no such tensor."""
        ...

    def read(self, name: str) -> FloatArray:
        """The tensor as float32."""
        ...


class CheckpointWeights(Mapping[WeightName, FloatArray]):
    """WeightStore that reads from the checkpoint at every lookup and keeps nothing."""

    def __init__(self, path: Path, config: ModelConfig, tensors: TensorFile) -> None:
        """Raises CheckpointError if a tensor of the model is missing or has another shape."""
        self._path = path
        self._config = config
        self._tensors = tensors
        self._shapes = weight_shapes(build_graph(config))
        for name, shape in self._file_shapes().items():
            self._check(name, shape)

    def __getitem__(self, name: WeightName) -> FloatArray:
        if name not in self._shapes:
            raise KeyError(name)
        source = source_of(self._config, name)
        tensor = self._tensors.read(self._tensor_name(name, source))
        if not np.isfinite(tensor).all():
            raise CheckpointError(self._path, f"tensor {name!r} holds NaN or infinity", DOWNLOAD_AGAIN)
        return tensor if source.rows is None else tensor[source.rows]

    def __iter__(self) -> Iterator[WeightName]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _file_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes that the file's tensors must have; a fused one has the rows of all that are cut from it."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, *rest) in self._shapes.items():
            source = source_of(self._config, name)
            tensor = self._tensor_name(name, source)
            before = 0 if source.rows is None else shapes.get(tensor, (0,))[0]
            shapes[tensor] = (before + rows, *rest)
        return shapes

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._tensors.shape(name)
        if found is None:
            raise CheckpointError(
                self._path, f"tensor {name!r} is missing", "the model's config and its weights do not belong together"
            )
        if found != shape:
            raise CheckpointError(
                self._path,
                f"tensor {name!r} is {list(found)} but the config implies {list(shape)}",
                "the model's config and its weights do not belong together",
            )

    def _tensor_name(self, name: WeightName, source: LinearSource) -> str:
        kind = name.rpartition(".")[2]
        former = ARCHITECTURES[self._config.architecture].former_modules.get(source.module, source.module)
        is_former = self._tensors.shape(f"{former}.{kind}") is not None
        return f"{former if is_former else source.module}.{kind}"
