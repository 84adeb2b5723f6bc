"""A plan, replayed op by op onto the native executor: names become offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

from edgellm.engines.cpu import plan
from edgellm.engines.cpu._native import Executor


@dataclass(frozen=True, kw_only=True)
class Run:
    """Native ops `begin` to `end`, run in one call; after them, `summed` is added up over the ranks."""

    begin: int
    end: int
    summed: plan.View | None


def native_runs(ops: Sequence[plan.PlanOp]) -> tuple[Run, ...]:
    """A plan's ops between its all-reduces: one run where there are none."""
    runs: list[Run] = []
    begin = end = 0
    for op in ops:
        if isinstance(op, plan.AllReduceOp):
            runs.append(Run(begin=begin, end=end, summed=op.x))
            begin = end
        else:
            end += 1
    return (*runs, Run(begin=begin, end=end, summed=None))


class Replay:
    """Adds the ops of one plan to an executor whose arena holds `max_rows` rows of every buffer."""

    def __init__(self, executor: Executor, buffers: Sequence[plan.Buffer], max_rows: int, kv_dtype: str) -> None:
        self._executor = executor
        self._buffers = buffers
        self._max_rows = max_rows
        self._kv_dtype = kv_dtype

    def add(self, op: plan.PlanOp) -> None:
        match op:
            case plan.InputOp():
                self._executor.input(out=self._rows(op.out), size=op.out.width)
            case plan.EmbedOp():
                self._embed(op)
            case plan.NormOp():
                self._norm(op)
            case plan.PrepareOp():
                self._prepare(op)
            case plan.LinearOp():
                self._linear(op)
            case plan.StoreKvOp():
                self._store_kv(op)
            case plan.AttendOp():
                self._attend(op)
            case plan.ActivateOp():
                up = None if op.up is None else self._rows(op.up)
                self._executor.activate(
                    kind=op.kind, x=self._rows(op.x), up=up, out=self._rows(op.out), size=op.out.width
                )
            case plan.AddOp():
                a, b, out = self._rows(op.a), self._rows(op.b), self._rows(op.out)
                self._executor.add(a=a, b=b, out=out, size=op.out.width)
            case plan.SelectOp():
                self._executor.select(x=self._rows(op.x), out=self._rows(op.out), size=op.out.width)
            case plan.AllReduceOp():
                pass  # not native: `native_runs` cut the plan here
            case _:
                assert_never(op)

    def _embed(self, op: plan.EmbedOp) -> None:
        self._executor.embed(
            form=op.form,
            out=self._rows(op.out),
            table=op.table.offset,
            scale=_offset(op.scale),
            channels=op.channels,
            padded_channels=op.padded_channels,
        )

    def _norm(self, op: plan.NormOp) -> None:
        self._executor.norm(
            kind=op.kind,
            x=self._rows(op.x),
            out=self._rows(op.out),
            weight=op.weight.offset,
            bias=_offset(op.bias),
            size=op.out.width,
            eps=op.eps,
        )

    def _prepare(self, op: plan.PrepareOp) -> None:
        self._executor.prepare(
            form=op.form,
            x=self._rows(op.x),
            out=self._records(op.out),
            input_scale=_offset(op.input_scale),
            outlier_columns=_offset(op.outlier_columns),
            channels=op.out.channels,
            padded_channels=op.out.padded_channels,
            outliers=op.out.outliers,
            padded_outliers=op.out.padded_outliers,
            group_size=op.out.group_size,
            quant_max=op.quant_max,
        )

    def _linear(self, op: plan.LinearOp) -> None:
        self._executor.linear(
            form=op.form,
            x=self._records(op.x),
            out=self._rows(op.out),
            weight=op.weight.offset,
            group_scale=_offset(op.group_scale),
            column_scale=_offset(op.column_scale),
            outlier_weight=_offset(op.outlier_weight),
            bias=_offset(op.bias),
            padded_channels=op.x.padded_channels,
            group_size=op.x.group_size,
            padded_outliers=op.x.padded_outliers,
            columns=op.out.width,
            residual=None if op.residual is None else self._rows(op.residual),
        )

    def _store_kv(self, op: plan.StoreKvOp) -> None:
        self._executor.store_kv(
            dtype=self._kv_dtype,
            layer=op.layer,
            q=self._rows(op.q),
            k=self._rows(op.k),
            v=self._rows(op.v),
            num_heads=op.num_heads,
            q_rotation=_offset(op.q_rotation),
            q_rotary_dim=op.q_rotary_dim,
            k_rotation=_offset(op.k_rotation),
            k_rotary_dim=op.k_rotary_dim,
        )

    def _attend(self, op: plan.AttendOp) -> None:
        self._executor.attend(
            dtype=self._kv_dtype,
            layer=op.layer,
            q=self._rows(op.q),
            out=self._rows(op.out),
            num_heads=op.num_heads,
            scale=op.scale,
        )

    def _rows(self, view: plan.View) -> tuple[int, int]:
        """Offset in bytes, stride in floats."""
        buffer = self._buffers[view.buffer]
        return buffer.row_offset * self._max_rows + 4 * view.column, buffer.row_bytes // 4

    def _records(self, records: plan.Records) -> tuple[int, int, int, int, int]:
        buffer = self._buffers[records.buffer]
        offset = buffer.row_offset * self._max_rows
        return offset, buffer.row_bytes, records.sums_at, records.outliers_at, records.scale_at


def _offset(segment: plan.Segment | None) -> int | None:
    return None if segment is None else segment.offset
