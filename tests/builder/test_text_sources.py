"""Text to measure on begins where the text to calibrate on ends, however long the windows of either are."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgellm.builder.build import _open
from edgellm.builder.context import BuildContext
from edgellm.builder.options import BuildOptions
from edgellm.builder.recipes import calibration_source
from edgellm.builder.text import read_windows, text_windows
from edgellm.builder.verify import evaluation_source

WORDS = ("cat", "dog", "tree", "house", "river", "stone", "bird")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Far more tokens than both need, and no two stretches of it alike."""
    words = np.random.default_rng(0).choice(WORDS, 20_000)
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": " ".join(words)}))
    return path


def context(checkpoint: Path, text_file: Path, cache: Path, max_seq_len: int) -> BuildContext:
    options = BuildOptions(
        checkpoint=str(checkpoint),
        output=cache / "bundle",
        cache_dir=cache,
        max_seq_len=max_seq_len,
        calib_data=text_file,
        eval_data=text_file,
    )
    return _open(options, lambda _step, _done, _total: None)


@pytest.mark.parametrize("max_seq_len", [64, 512])
def test_one_file_serves_for_both(stories260k: Path, text_file: Path, tmp_path: Path, max_seq_len: int) -> None:
    opened = context(stories260k, text_file, tmp_path / "cache", max_seq_len)
    calibrated, measured = (
        read_windows(text_windows(opened, source(opened), pytest.fail)).ravel()
        for source in (calibration_source, evaluation_source)
    )
    assert measured.shape == (24 * max_seq_len,)
    starts = np.lib.stride_tricks.sliding_window_view(calibrated, max_seq_len)
    assert not (starts == measured[:max_seq_len]).all(axis=1).any()


def test_texts_of_other_libraries_are_others(
    stories260k: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer of another version may give other tokens."""
    first = context(stories260k, text_file, tmp_path / "cache", 64)
    again = context(stories260k, text_file, tmp_path / "cache", 64)
    other = context(stories260k, text_file, tmp_path / "cache", 64)
    keys = [text_windows(one, evaluation_source(one), pytest.fail).key for one in (first, again)]
    monkeypatch.setattr("edgellm.builder.steps.version", lambda name: "0" if name == "tokenizers" else "1")
    keys.append(text_windows(other, evaluation_source(other), pytest.fail).key)
    assert keys[0] == keys[1] != keys[2]
