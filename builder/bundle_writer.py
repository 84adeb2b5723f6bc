"""Put a bundle together from finished engines, all at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgellm.builder.errors import BuildError
from edgellm.builder.files import copy_files, describe_file, new_folder
from edgellm.engines.bundle import BUNDLE_FILE, ENGINE_FILE, TOKENIZER_FOLDER, Bundle
from edgellm.engines.spec import EngineFile, EngineSpec


@dataclass(frozen=True, kw_only=True)
class CompiledEngine:
    """An engine's identity and where its files are now."""

    spec: EngineSpec
    folder: Path


def require_target(output: Path) -> None:
    """Raise BuildError if a bundle must not be written at `output`."""
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / BUNDLE_FILE).exists()):
        raise BuildError(f"{output} exists and is not a bundle; choose another --output, or remove it yourself")


def write_bundle(
    output: Path, bundle: Bundle, engines: Sequence[CompiledEngine], write_tokenizer: Callable[[Path], None]
) -> Bundle:
    """Write `bundle`, with its `engines` and `files` filled in, and return it as written.

    A bundle that is already there is replaced. Raises BuildError if the disk is full; nothing is left behind then.
    """
    require_target(output)
    with new_folder(output) as folder:
        write_tokenizer(folder / TOKENIZER_FOLDER)
        for engine in engines:
            copy_files(engine.folder, folder / engine.spec.name, engine.spec.files)
            _write_json(folder / engine.spec.name / ENGINE_FILE, engine.spec)
        written = replace(bundle, engines=tuple(engine.spec.name for engine in engines), files=_small_files(folder))
        _write_json(folder / BUNDLE_FILE, written)
    return written


def _small_files(folder: Path) -> tuple[EngineFile, ...]:
    """What bundle.json itself vouches for: the tokenizer and every engine.json."""
    paths = [*folder.glob(f"{TOKENIZER_FOLDER}/*"), *folder.glob(f"*/{ENGINE_FILE}")]
    return tuple(describe_file(folder, path) for path in sorted(paths))


def _write_json(path: Path, value: Bundle | EngineSpec) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")
