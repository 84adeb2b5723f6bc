"""Calibration windows: token ids from a file, or sampled from the model itself."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

Encode: TypeAlias = Callable[[str], Sequence[int]]
"""Token ids of a text, without special tokens."""


class CalibrationTextError(ValueError):
    """The calibration text cannot be used; the message says why and what to do."""


def windows_from_file(
    path: Path, encode: Encode, bos_token_id: int | None, *, skip_tokens: int = 0, count: int, tokens: int
) -> torch.Tensor:
    """int64 [count, tokens]: the file's texts, joined by BOS where there is one, after the first `skip_tokens` tokens.

    `.jsonl` has one object with a string `text` per line, `.txt` is one text. Windows that the file is too short for
    are left out, but at least one must remain. Raises CalibrationTextError.
    """
    ids: list[int] = []
    for text in read_texts(path):
        ids += [bos_token_id] if bos_token_id is not None else []
        ids += encode(text)
        if len(ids) >= skip_tokens + count * tokens:
            break
    found = min(count, (len(ids) - skip_tokens) // tokens)
    if found < 1:
        raise CalibrationTextError(
            f"{path} has {len(ids)} tokens, but at least {skip_tokens + tokens} are needed; give more text"
        )
    return torch.tensor(ids[skip_tokens : skip_tokens + found * tokens]).view(found, tokens)


def read_texts(path: Path) -> Iterator[str]:
    """The file's non-empty texts. Raises CalibrationTextError if there are none, naming the line that is wrong."""
    if path.suffix not in (".jsonl", ".txt"):
        raise CalibrationTextError(
            f"{path}: calibration text is a .jsonl file with `text` in each line, or a .txt file"
        )
    content = _read_utf8(path)
    texts = [content] if path.suffix == ".txt" else _jsonl_texts(path, content)
    found = False
    for text in texts:
        if text.strip():
            found = True
            yield text
    if not found:
        raise CalibrationTextError(f"{path} holds no text")


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationTextError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        ) from None
    except OSError as error:
        raise CalibrationTextError(f"cannot read {path}: {error.strerror}") from None


def _jsonl_texts(path: Path, content: str) -> Iterator[str]:
    """Lines end at line feeds only: `splitlines` would also cut at U+2028 and others, which JSON strings may hold."""
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise CalibrationTextError(f"{path}, line {number}: not a JSON object with a string `text`")
        yield text
