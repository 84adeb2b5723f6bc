"""Types of the native module; see native/module.cpp."""

import numpy as np
import numpy.typing as npt

_Rows = tuple[int, int]
_Records = tuple[int, int, int, int, int]

def available_isas() -> list[str]: ...

class Executor:
    def __init__(
        self,
        *,
        isa: str,
        threads: int,
        max_rows: int,
        max_sequences: int,
        arena: npt.NDArray[np.uint8],
        weights: npt.NDArray[np.uint8],
        pool: npt.NDArray[np.uint8],
        num_blocks: int,
        block_bytes: int,
        kv_heads: int,
        head_dim: int,
        group: int,
    ) -> None: ...
    def input(self, *, out: _Rows, size: int) -> None: ...
    def embed(
        self, *, form: str, out: _Rows, table: int, scale: int | None, channels: int, padded_channels: int
    ) -> None: ...
    def norm(
        self, *, kind: str, x: _Rows, out: _Rows, weight: int, bias: int | None, size: int, eps: float
    ) -> None: ...
    def prepare(
        self,
        *,
        form: str,
        x: _Rows,
        out: _Records,
        input_scale: int | None,
        outlier_columns: int | None,
        channels: int,
        padded_channels: int,
        outliers: int,
        padded_outliers: int,
        group_size: int,
        quant_max: float,
    ) -> None: ...
    def linear(
        self,
        *,
        form: str,
        x: _Records,
        out: _Rows,
        weight: int,
        group_scale: int | None,
        column_scale: int | None,
        outlier_weight: int | None,
        bias: int | None,
        padded_channels: int,
        group_size: int,
        padded_outliers: int,
        columns: int,
        residual: _Rows | None,
    ) -> None: ...
    def store_kv(
        self,
        *,
        dtype: str,
        layer: int,
        q: _Rows,
        k: _Rows,
        v: _Rows,
        num_heads: int,
        q_rotation: int | None,
        q_rotary_dim: int,
        k_rotation: int | None,
        k_rotary_dim: int,
    ) -> None: ...
    def attend(self, *, dtype: str, layer: int, q: _Rows, out: _Rows, num_heads: int, scale: float) -> None: ...
    def activate(self, *, kind: str, x: _Rows, up: _Rows | None, out: _Rows, size: int) -> None: ...
    def add(self, *, a: _Rows, b: _Rows, out: _Rows, size: int) -> None: ...
    def select(self, *, x: _Rows, out: _Rows, size: int) -> None: ...
    def run(
        self,
        *,
        tokens: npt.NDArray[np.int32] | None,
        hidden: npt.NDArray[np.float32] | None,
        row_starts: npt.NDArray[np.int32],
        first_positions: npt.NDArray[np.int32],
        block_tables: npt.NDArray[np.int32],
        logit_rows: npt.NDArray[np.int32],
        begin: int = 0,
        end: int | None = None,
    ) -> int: ...
