"""Measure what a bundle's engines make of text that they were not calibrated on."""

from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.builder.bundle_writer import CompiledEngine
from edgellm.builder.context import BuildContext
from edgellm.builder.files import text_sha256
from edgellm.builder.recipes import WINDOW_TOKENS, calibration_source
from edgellm.builder.steps import StepResult, code_sha256, library_versions
from edgellm.builder.text import TextSource, read_windows, text_windows
from edgellm.engines.base import Engine
from edgellm.engines.bundle import Quality, file_sha256
from edgellm.engines.load import create_engine
from edgellm.engines.weights import FloatArray

EVALUATION_WINDOWS: Final = 24
_FILE: Final = "quality.json"


def measure(context: BuildContext, prefill: CompiledEngine, decode: CompiledEngine) -> Quality:
    """Perplexity and divergence of the prefill engine, the decode engine, and the two in turn; both with all layers.

    Raises BuildError for a text that cannot be used.
    """
    source = evaluation_source(context)
    text = text_windows(context, source, lambda: prefill)
    inputs = {
        "prefill": text_sha256(repr(prefill.spec)),
        "decode": text_sha256(repr(decode.spec)),
        "text": f"{text.key} {source.description}",
        "code": code_sha256("edgellm.calib", "edgellm.engines", "edgellm.builder.checkpoint"),
        "libraries": library_versions(),
    }
    step = context.cache.run(
        "quality", inputs, lambda folder: _measure(context, prefill, decode, text, source.description, folder)
    )
    return msgspec.json.decode((step.folder / _FILE).read_bytes(), type=Quality)


def evaluation_source(context: BuildContext) -> TextSource:
    """Text that calibration does not see: another file, what follows in the same file, or another seed."""
    options, calibration = context.options, calibration_source(context)
    file = options.eval_data
    shared = file and calibration.file and file_sha256(file) == file_sha256(calibration.file)
    return TextSource(
        step="evaluation-text",
        file=file,
        skip_tokens=calibration.count * calibration.tokens if shared else 0,
        count=EVALUATION_WINDOWS,
        tokens=min(WINDOW_TOKENS, context.max_seq_len),
        seed=options.quantize.seed + 1,
    )


def _measure(
    context: BuildContext,
    prefill: CompiledEngine,
    decode: CompiledEngine,
    text: StepResult,
    description: str,
    folder: Path,
) -> None:
    from edgellm.calib.quality import measure_quality

    windows = read_windows(text)
    tokens = windows.shape[1]
    with closing(_load(context, prefill, tokens)) as half, closing(_load(context, decode, tokens)) as quantized:
        quality = measure_quality(
            reference=lambda tokens: _reference_logits(context, tokens),
            prefill=half,
            decode=quantized,
            windows=windows,
            text=description,
            progress=context.progress,
        )
    (folder / _FILE).write_bytes(msgspec.json.encode(quality))


def _load(context: BuildContext, engine: CompiledEngine, tokens: int) -> Engine:
    """With KV for two windows, which the measurement needs at once."""
    blocks = 2 * context.contract.blocks_for(tokens)
    return create_engine(engine.folder, engine.spec, contract=context.contract, kv_blocks=blocks)


def _reference_logits(context: BuildContext, tokens: npt.NDArray[np.int64]) -> FloatArray:
    """Full precision, by `transformers`: [n, vocab_size]."""
    import torch

    with torch.inference_mode():
        logits = context.load_torch()(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    reference: FloatArray = logits[:, : context.checkpoint.config.vocab_size].float().numpy()
    return reference
