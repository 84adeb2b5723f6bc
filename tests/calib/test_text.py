import dataclasses
from pathlib import Path

import pytest
import torch

from edgellm.calib.sample import sample_windows
from edgellm.calib.text import CalibrationTextError, read_texts, windows_from_file


def by_letter(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_windows_run_over_the_texts_joined_by_bos(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "ab"}\n\n{"text": "cde"}\n{"text": "   "}\n{"text": "fg", "url": "x"}\n')
    windows = windows_from_file(path, by_letter, 1, count=3, tokens=3)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[1, *b"ab"], [1, *b"cd"], [*b"e", 1, *b"f"]]


def test_a_txt_file_is_one_text_and_skipped_tokens_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    assert windows_from_file(path, by_letter, None, skip_tokens=4, count=2, tokens=3).tolist() == [[*b"efg"], [*b"hij"]]


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """A JSON string may hold the other line ends of Unicode as they are."""
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\r\n{"text": "d"}\n', encoding="utf-8")
    assert list(read_texts(path)) == ["a\u2028b\u0085c", "d"]


def test_a_short_file_gives_fewer_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefg")
    assert windows_from_file(path, by_letter, None, count=16, tokens=3).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.jsonl", b"\n\n", "holds no text"),
        ("blank_text.jsonl", b'{"text": "  "}', "holds no text"),
        ("latin.txt", b"caf\xe9", "is not UTF-8: byte 3 is 0xe9"),
        ("number.jsonl", b'{"text": "a"}\n{"text": 3}\n', "line 2: not a JSON object with a string `text`"),
        ("list.jsonl", b"[1]", "line 1: not a JSON object"),
        ("broken.jsonl", b'{"text": "a"', "line 1: not a JSON object"),
        ("text.csv", b"a,b", r"is a .jsonl file .* or a .txt file"),
        ("short.txt", b"abc", "has 3 tokens, but at least 8 are needed; give more text"),
    ],
)
def test_bad_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CalibrationTextError, match=message):
        windows_from_file(path, by_letter, None, count=1, tokens=8)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationTextError, match=r"cannot read .*: No such file"):
        list(read_texts(tmp_path / "none.txt"))


def test_sampling_depends_on_the_seed_alone(stories) -> None:
    first, again, other = (stories.sample(3, 40, seed) for seed in (1, 1, 2))
    assert first.shape == (3, 40)
    assert (first[:, 0] == stories.bos_token_id).all()
    assert (first == again).all()
    assert (first != other).any()
    assert (first[0] != first[1]).any()


def test_sampled_text_is_what_the_model_finds_likely(stories) -> None:
    """A fresh forward pass gives the sampled tokens far more than the probability of a blind guess."""
    text = torch.from_numpy(stories.sample(4, 64, seed=3))
    with torch.inference_mode():
        log_p = stories.torch_model(text).logits[:, :-1].log_softmax(-1)
    assert -log_p.gather(2, text[:, 1:, None]).mean() < 3 < torch.tensor(512.0).log()


def test_blocks_are_freed_when_sampling_fails(stories) -> None:
    pool = stories.pool(8)
    engine = stories.engine(stories.graph, stories.weights, pool, max_sequences=2)
    engine.spec = dataclasses.replace(engine.spec, vocab_size=2)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        sample_windows(engine, bos_token_id=5, count=2, tokens=40, seed=0, progress=lambda *_: None)
    assert pool.free_blocks == 8
