"""Tensors of safetensors files, single or sharded, read lazily.

Format: u64 little-endian header length, a JSON header of name -> {dtype, shape, data_offsets}, then the data. The
`safetensors` package's NumPy side cannot read bf16, and its errors name neither file nor tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgellm.builder.checkpoint.errors import DOWNLOAD_AGAIN, CheckpointError
from edgellm.engines.weights import FloatArray

_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype("<u2"),
}
_INDEX = "model.safetensors.index.json"
_HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class _Entry:
    path: Path
    offset: int
    """Bytes from the start of the file."""
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """All tensors of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        """Reads headers only. Raises CheckpointError if a file is missing, truncated or has a broken header."""
        self._folder = folder
        self.paths = _weight_files(folder)
        self._entries = {name: entry for path in self.paths for name, entry in _read_header(path).items()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The tensor's shape, or None if there is no such tensor."""
        entry = self._entries.get(name)
        return None if entry is None else entry.shape

    def read(self, name: str) -> FloatArray:
        """The tensor as float32, copied from the file."""
        entry = self._entries[name]
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                entry.path,
                f"tensor {name!r} has dtype {entry.dtype}, which is not supported",
                f"convert the model to one of {', '.join(_DTYPES)}",
            )
        dtype = _DTYPES[entry.dtype]
        flat = np.fromfile(entry.path, dtype, math.prod(entry.shape), offset=entry.offset)
        return _to_float32(flat, entry.dtype).reshape(entry.shape)


def _to_float32(flat: np.ndarray[Any, np.dtype[Any]], dtype: str) -> FloatArray:
    """bf16 is the upper half of a float32's bits."""
    if dtype == "BF16":
        return (flat.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return flat.astype(np.float32)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    single = folder / "model.safetensors"
    if single.is_file():
        return (single,)
    index = folder / _INDEX
    if not index.is_file():
        raise CheckpointError(folder, *_no_weights(folder))
    names = _shards(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(folder, f"shard {missing[0]} is missing", "download it into this folder")
    return tuple(folder / name for name in names)


class _Index(msgspec.Struct):
    """model.safetensors.index.json, as far as it matters here."""

    weight_map: dict[str, str]


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(msgspec.json.decode(index.read_bytes(), type=_Index).weight_map.values()))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(index, f"not a safetensors index ({error})", DOWNLOAD_AGAIN) from error
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(index, f"names the shard {name!r}, which is outside of its folder", DOWNLOAD_AGAIN)
    return names


def _no_weights(folder: Path) -> tuple[str, str]:
    if any(folder.glob("*.bin")):
        return (
            "has pickled weights (.bin) only",
            "convert them with transformers' save_pretrained, which writes safetensors",
        )
    return f"has neither model.safetensors nor {_INDEX}", "pass a folder with the model's weights"


def _read_header(path: Path) -> dict[str, _Entry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH_BYTES), "little")
        if size < _HEADER_LENGTH_BYTES or length > size - _HEADER_LENGTH_BYTES:
            raise CheckpointError(path, f"is {size} bytes long, shorter than its own header", DOWNLOAD_AGAIN)
        raw = file.read(length)
    try:
        header = msgspec.json.decode(raw, type=dict[str, dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(path, f"its header is not JSON ({error})", DOWNLOAD_AGAIN) from error
    header.pop("__metadata__", None)
    start = _HEADER_LENGTH_BYTES + length
    return {name: _entry(path, name, fields, start, size) for name, fields in header.items()}


def _entry(path: Path, name: str, fields: Mapping[str, Any], start: int, file_bytes: int) -> _Entry:
    try:
        dtype, shape = fields["dtype"], tuple(int(size) for size in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"the header's entry of tensor {name!r} is broken", DOWNLOAD_AGAIN) from error
    if start + end > file_bytes:
        raise CheckpointError(
            path, f"is {file_bytes} bytes long but tensor {name!r} ends at byte {start + end}", DOWNLOAD_AGAIN
        )
    if begin < 0 or (dtype in _DTYPES and end - begin != math.prod(shape) * _DTYPES[dtype].itemsize):
        raise CheckpointError(
            path, f"tensor {name!r} has {end - begin} bytes, which do not fit {dtype} {list(shape)}", DOWNLOAD_AGAIN
        )
    return _Entry(path=path, offset=start + begin, dtype=dtype, shape=shape)
