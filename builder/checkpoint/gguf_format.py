"""The GGUF container: metadata and the places of tensors.

Little-endian: magic `GGUF`, u32 version, u64 tensors, u64 metadata pairs; pairs of key, u32 kind, value; tensors of
name, u32 dimensions, u64 sizes (fastest first), u32 type, u64 offset; padding; data. Strings are u64 length and UTF-8.
The `gguf` package knows the same, but makes a memory map object of every string, which takes seconds per vocabulary.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from edgellm.builder.checkpoint.errors import DOWNLOAD_AGAIN, CheckpointError
from edgellm.engines.weights import FloatArray

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """Where one tensor lies."""

    shape: tuple[int, ...]
    """Slowest dimension first, as NumPy has it."""
    kind: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the fastest dimension."""
        block, block_bytes = GGML_QUANT_SIZES[self.kind]
        bytes_per_row: int = self.shape[-1] // block * block_bytes
        return bytes_per_row

    @property
    def end(self) -> int:
        """One past its last byte in the file."""
        return self.offset + math.prod(self.shape[:-1]) * self.row_bytes


class GgufContainer:
    """A memory-mapped GGUF file: `metadata` by key, `tensors` by name."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is no GGUF, or is damaged."""
        self._path = path
        with path.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(path, "does not start with GGUF", "pass a .gguf file")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.tensors = _parse(_Cursor(self._data, len(_MAGIC)))
        except (struct.error, ValueError, KeyError) as error:
            raise CheckpointError(path, f"cannot be read as GGUF ({error})", DOWNLOAD_AGAIN) from error
        for name, tensor in self.tensors.items():
            if tensor.end > len(self._data):
                problem = f"is {len(self._data)} bytes long but tensor {name!r} ends at byte {tensor.end}"
                raise CheckpointError(path, problem, DOWNLOAD_AGAIN)

    def read(self, name: str) -> FloatArray:
        """The tensor dequantised to float32, never a view of the file."""
        tensor = self.tensors[name]
        raw: npt.NDArray[np.uint8] = np.frombuffer(self._data, np.uint8, tensor.end - tensor.offset, tensor.offset)
        try:
            values = dequantize(raw.reshape(-1, tensor.row_bytes), tensor.kind)
        except NotImplementedError as error:
            problem = f"tensor {name!r} has type {tensor.kind.name}, which is not supported"
            raise CheckpointError(self._path, problem, "choose a file of another quantisation") from error
        return np.array(values, np.float32).reshape(tensor.shape)


class _Cursor:
    """Reads values one after the other; struct.error at the end of the data."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        raw = self.data[self.offset : self.offset + length]
        if len(raw) < length:
            raise ValueError(f"a string of {length} bytes reaches past the end")
        self.offset += length
        return raw.decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.scalar("<I"), self.scalar("<Q"))
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int) -> list[Any]:
        if kind == _ARRAY:
            raise ValueError("an array of arrays")
        if count > len(self.data) - self.offset:
            raise ValueError(f"an array of {count} values reaches past the end")
        return [self.value(kind) for _ in range(count)]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, where {' and '.join(map(str, _VERSIONS))} are known")
    num_tensors, num_pairs = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(num_pairs)}
    tensors = {cursor.string(): _parse_tensor(cursor) for _ in range(num_tensors)}
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"alignment {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    return metadata, {name: _moved(tensor, start) for name, tensor in tensors.items()}


def _parse_tensor(cursor: _Cursor) -> GgufTensor:
    """One tensor's entry; its offset counts from the start of the data."""
    sizes = [cursor.scalar("<Q") for _ in range(cursor.scalar("<I"))]
    if 0 in sizes or not sizes:
        raise ValueError(f"a tensor of sizes {sizes}")
    kind = GGMLQuantizationType(cursor.scalar("<I"))
    return GgufTensor(shape=tuple(reversed(sizes)), kind=kind, offset=cursor.scalar("<Q"))


def _moved(tensor: GgufTensor, distance: int) -> GgufTensor:
    return GgufTensor(shape=tensor.shape, kind=tensor.kind, offset=tensor.offset + distance)
