"""Token windows to calibrate and to measure on: from a file, or sampled from the model."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from edgellm.builder.bundle_writer import CompiledEngine
from edgellm.builder.context import BuildContext
from edgellm.builder.errors import expected
from edgellm.builder.files import text_sha256
from edgellm.builder.steps import StepResult, code_sha256, library_versions
from edgellm.engines.bundle import file_sha256
from edgellm.engines.load import create_engine

_CODE: Final = ("edgellm.builder.checkpoint", "edgellm.builder.models", "edgellm.calib", "edgellm.engines")
_FILE: Final = "windows.npy"


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """Which text."""

    step: str
    file: Path | None
    """None: sampled from the model."""
    skip_tokens: int
    """Of the file's beginning, which something else uses."""
    count: int
    tokens: int
    """Per window."""
    seed: int

    @property
    def description(self) -> str:
        return f"sampled from the model, seed {self.seed}" if self.file is None else self.file.name


def text_windows(context: BuildContext, source: TextSource, whole_half: Callable[[], CompiledEngine]) -> StepResult:
    """Windows of the text, kept in the cache; `read_windows` reads them. Called only if there is no file, `whole_half`
    gives the engine that writes the text.

    Raises BuildError for a file that has too little text or cannot be read.
    """

    def make(folder: Path) -> None:
        windows = _sample(context, source, whole_half()) if source.file is None else _read(context, source, source.file)
        np.save(folder / _FILE, windows)

    inputs = {
        "checkpoint": context.checkpoint.sha256,
        "text": _sampled(source, whole_half()) if source.file is None else file_sha256(source.file),
        "windows": f"after {source.skip_tokens}, {source.count} of {source.tokens}",
        "code": code_sha256(*_CODE),
        "libraries": library_versions(),
    }
    return context.cache.run(source.step, inputs, make)


def read_windows(step: StepResult) -> npt.NDArray[np.int64]:
    """[count, tokens] token ids."""
    windows: npt.NDArray[np.int64] = np.load(step.folder / _FILE)
    return windows


def _read(context: BuildContext, source: TextSource, file: Path) -> npt.NDArray[np.int64]:
    from edgellm.calib.text import CalibrationTextError, windows_from_file

    tokenizer = Tokenizer.from_str(context.checkpoint.tokenizer.tokenizer_json)
    with expected(CalibrationTextError):
        windows = windows_from_file(
            file,
            lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            context.checkpoint.generation.bos_token_id,
            skip_tokens=source.skip_tokens,
            count=source.count,
            tokens=source.tokens,
        )
    return windows.numpy()


def _sample(context: BuildContext, source: TextSource, half: CompiledEngine) -> npt.NDArray[np.int64]:
    from edgellm.calib.sample import sample_windows

    blocks = source.count * context.contract.blocks_for(source.tokens)
    with closing(create_engine(half.folder, half.spec, contract=context.contract, kv_blocks=blocks)) as engine:
        return sample_windows(
            engine,
            bos_token_id=context.checkpoint.generation.bos_token_id,
            count=source.count,
            tokens=source.tokens,
            seed=source.seed,
            progress=lambda _step, done, total: context.progress(f"sampling {source.step}", done, total),
        )


def _sampled(source: TextSource, half: CompiledEngine) -> str:
    """What identifies sampled text: where it starts, and the bytes of the engine that writes it."""
    return f"seed {source.seed} {text_sha256(repr(half.spec))}"
