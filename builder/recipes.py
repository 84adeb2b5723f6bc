"""The two versions of a model that a bundle carries: half precision for prefill, quantised for decode."""

import errno
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgellm.builder.bundle_writer import CompiledEngine
from edgellm.builder.context import BuildContext
from edgellm.builder.errors import expected
from edgellm.builder.files import text_sha256
from edgellm.builder.models import build_graph
from edgellm.builder.steps import StepResult, code_sha256, library_versions
from edgellm.builder.text import TextSource, read_windows, text_windows
from edgellm.calib.recipe import quantized_graph
from edgellm.engines.graph import Graph
from edgellm.engines.weights import WeightStore

CALIBRATION_WINDOWS = 16
WINDOW_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A graph and the weights that belong to it."""

    graph: Graph
    key: str
    """Identifies the weights: sha256 of all that they were made from."""
    load_weights: Callable[[], WeightStore]
    """Called only if an engine has to be compiled."""


def decode_graph(context: BuildContext) -> Graph:
    """The whole model in the precisions that decode engines will have; known before anything is calibrated."""
    graph = build_graph(context.checkpoint.config)
    return graph if context.options.precision_decode == "half" else quantized_graph(graph, context.options.quantize)


def half_recipe(context: BuildContext) -> Recipe:
    """The checkpoint's own weights."""
    checkpoint = context.checkpoint
    code = code_sha256("edgellm.builder.checkpoint", "edgellm.builder.models")
    return Recipe(
        graph=build_graph(checkpoint.config),
        key=text_sha256(f"{checkpoint.sha256} {code}"),
        load_weights=lambda: checkpoint.weights,
    )


def decode_recipe(context: BuildContext, whole_half: Callable[[], CompiledEngine]) -> Recipe:
    """Quantised weights from the cache, or quantised now; the checkpoint's own where decode is in half precision.

    `whole_half` compiles the half-precision engine of the whole model; needed where it has to write the text.
    """
    if context.options.precision_decode == "half":
        return half_recipe(context)
    text = text_windows(context, calibration_source(context), whole_half)
    inputs = {
        "weights": half_recipe(context).key,
        "text": text.key,
        "options": repr(context.options.quantize),
        "code": code_sha256("edgellm.calib"),
        "libraries": library_versions(),
    }
    step = context.cache.run("quantize", inputs, lambda folder: _quantize(context, text, folder))
    return Recipe(
        graph=decode_graph(context),
        key=step.key,
        load_weights=functools.cache(lambda: _load(step.folder)),
    )


def calibration_source(context: BuildContext) -> TextSource:
    """Windows no longer than the model's positions, or than the engine takes that has to write them."""
    file = context.options.calib_data
    return TextSource(
        step="calibration-text",
        file=file,
        skip_tokens=0,
        count=CALIBRATION_WINDOWS,
        tokens=min(WINDOW_TOKENS, context.max_seq_len if file is None else context.checkpoint.config.max_seq_len),
        seed=context.options.quantize.seed,
    )


def _quantize(context: BuildContext, text: StepResult, folder: Path) -> None:
    import torch
    from safetensors import SafetensorError

    from edgellm.calib.quantize import CalibrationError, quantize
    from edgellm.calib.store import save_quantized

    with expected(CalibrationError):
        graph, weights = quantize(
            build_graph(context.checkpoint.config),
            context.checkpoint.weights,
            context.load_torch(),
            torch.from_numpy(read_windows(text)),
            context.checkpoint.source_of,
            context.options.quantize,
            context.progress,
        )
    try:
        save_quantized(folder, graph, weights)
    except SafetensorError as error:
        raise OSError(_error_number(error), str(error)) from error


def _error_number(error: Exception) -> int:
    """The system's error number, which safetensors gives only in the text of its errors."""
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else errno.EIO


def _load(folder: Path) -> WeightStore:
    from edgellm.calib.store import load_quantized

    return load_quantized(folder)[1]
