"""What edgellm-build prints: the plan, progress, and a finished bundle, for people or as JSON."""

import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from edgellm.builder.build import BuildReport
from edgellm.builder.show_networks import network_tables
from edgellm.engines.bundle import Bundle, Plan, Quality, bundle_sha256
from edgellm.engines.spec import EngineSpec
from edgellm.engines.tensorrt.manifest import EngineManifest

_MIB = 1 << 20
LINE_EVERY_S: Final = 15.0
"""Where progress is written as lines, a step that takes longer says how far it is."""


class ProgressBars:
    """One bar per step on standard error, while in use; where that is no terminal, a line, and more for a long step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._written_s: dict[str, float] = {}
        """When the last line of each step was."""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._progress.stop()

    def update(self, step: str, done: int, total: int) -> None:
        """Move the bar of `step`."""
        if not self._console.is_terminal:
            self._write(step, done, total)
            return
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step)
        self._progress.update(self._tasks[step], completed=done, total=total)

    def _write(self, step: str, done: int, total: int) -> None:
        now_s = self._clock()
        if step not in self._written_s:
            self._console.print(f"{step} ...")
        elif now_s - self._written_s[step] >= LINE_EVERY_S and done < total:
            self._console.print(f"{step} ... {done} of {total}")
        else:
            return
        self._written_s[step] = now_s


def _table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str | None = None) -> Table:
    """Made to fit 80 columns; on a narrower terminal cells fold rather than lose characters."""
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in names:
        table.add_column(heading, overflow="fold", no_wrap=heading == names[0])
    for heading in numbers:
        table.add_column(heading, justify="right", overflow="fold")
    return table


def plan_table(plan: Plan) -> Table:
    """Who runs what, and the predictions."""
    table = _table(
        "Placement",
        ("device", "class", "role", "layers", "precision"),
        ("MiB", "KV tokens"),
        f"predicted from the device profiles, idle: TTFT {plan.predicted_ttft_ms:.1f} ms for a 512-token prompt, "
        f"TPOT {plan.predicted_tpot_ms:.2f} ms at batch 1",
    )
    roles = [(placement.role, placement) for placement in plan.placements]
    for role, placement in [*roles, *(("takeover", placement) for placement in plan.takeover)]:
        table.add_row(
            placement.device,
            placement.device_class,
            role,
            f"{placement.first_layer}-{placement.first_layer + placement.num_layers - 1}",
            placement.precision,
            f"{placement.weight_bytes / _MIB:,.1f}",
            f"{placement.kv_tokens:,}",
        )
    return table


def engine_table(engines: Sequence[EngineSpec]) -> Table:
    """What was compiled."""
    table = _table("Engines", ("engine", "class", "backend", "layers", "precision"), ("MiB", "rows", "tokens"))
    for engine in engines:
        table.add_row(
            engine.name,
            engine.device_class,
            engine.backend_version,
            f"{engine.first_layer}-{engine.first_layer + engine.num_layers - 1}",
            engine.precision,
            f"{sum(file.bytes for file in engine.files) / _MIB:,.1f}",
            str(engine.limits.max_rows),
            str(engine.limits.max_seq_len),
        )
    return table


def quality_table(quality: Quality) -> Table:
    """Perplexity and divergence of each way of running the model."""
    caption = f"{quality.windows} windows of {quality.window_tokens} tokens: {quality.text}"
    table = _table("Quality", ("path",), ("perplexity", "change", "KL to reference"), caption)
    reference = quality.perplexity["reference"]
    for path, perplexity in quality.perplexity.items():
        divergence = quality.kl_to_reference.get(path)
        table.add_row(
            path,
            f"{perplexity:.3f}",
            f"{perplexity / reference - 1:+.2%}",
            "" if divergence is None else f"{divergence:.4f}",
        )
    return table


def bundle_renderables(
    path: Path, bundle: Bundle, engines: Sequence[EngineSpec], manifests: Mapping[str, EngineManifest]
) -> Iterator[RenderableType]:
    """A whole bundle; `manifests` of its TensorRT engines."""
    yield f"{bundle.model.id} ({bundle.model.architecture}), bundle {bundle_sha256(path)[:12]} at {path}"
    yield f"KV: {bundle.kv.dtype}, {bundle.kv.bytes_per_token:,} bytes per token, contract {bundle.kv.sha256[:12]}"
    yield engine_table(engines)
    yield from network_tables(engines, manifests)
    yield plan_table(bundle.plan)
    if bundle.quality is not None:
        yield quality_table(bundle.quality)


def report_renderables(path: Path, report: BuildReport) -> Iterator[RenderableType]:
    """What a build did, after its plan was shown."""
    for step in report.steps:
        yield f"{'reused' if step.reused else 'done  '}  {step.step}"
    if report.bundle.quality is not None:
        yield quality_table(report.bundle.quality)
    yield from report.notes
    yield f"bundle {bundle_sha256(path)[:12]} written to {path}"


def report_json(path: Path, report: BuildReport) -> str:
    """One JSON object: the bundle and how it came about."""
    return _json(
        path,
        report.bundle,
        notes=report.notes,
        steps=[{"step": step.step, "key": step.key, "reused": step.reused} for step in report.steps],
    )


def bundle_json(
    path: Path, bundle: Bundle, engines: Sequence[EngineSpec], manifests: Mapping[str, EngineManifest]
) -> str:
    """One JSON object: the bundle and its engines."""
    return _json(path, bundle, engine_specs=engines, networks=manifests)


def _json(path: Path, bundle: Bundle, **more: object) -> str:
    fields = {"path": str(path), "sha256": bundle_sha256(path), "bundle": bundle, **more}
    return msgspec.json.encode(fields).decode()
