"""Detokenising and stop strings: any cut of the tokens equals the whole."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgellm.orchestrator.text import AnswerText, Detokenizer, StopStrings

SENTENCEPIECE = Path(__file__).parents[3] / "shared/models/stories260K/tokenizer.json"


def byte_tokenizer() -> Tokenizer:
    """One token per byte, and three of several bytes that begin or end inside a character."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    for text in ("Ã", "Ġ", "ðŁ", "Ļ"):
        vocabulary.setdefault(text, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


BYTES = byte_tokenizer()


def byte_ids() -> list[int]:
    """Token of each byte. Byte-level vocabularies spell printable bytes as themselves, others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [BYTES.token_to_id(chr(byte if byte in printable else next(others))) for byte in range(256)]


BYTE_IDS = byte_ids()


@given(st.lists(st.integers(0, BYTES.get_vocab_size() - 1), max_size=60))
def test_any_bytes_stream_to_what_they_decode_to(tokens):
    detokenizer = Detokenizer(BYTES.decode)
    streamed = "".join(detokenizer.feed(token) for token in tokens) + detokenizer.flush()
    assert streamed == BYTES.decode(tokens)


@given(st.lists(st.sampled_from([*"\ufffdé😀a"]) | st.binary(max_size=6), max_size=30))
def test_broken_bytes_between_characters_stream_likewise(parts):
    data = b"".join(part if isinstance(part, bytes) else part.encode() for part in parts)
    tokens = [BYTE_IDS[byte] for byte in data]
    detokenizer = Detokenizer(BYTES.decode)
    streamed = "".join(detokenizer.feed(token) for token in tokens) + detokenizer.flush()
    assert streamed == data.decode(errors="replace")


def test_bytes_that_are_no_text_cost_no_more_than_others():
    decoded: list[int] = []

    def decode(tokens: Sequence[int]) -> str:
        decoded.append(len(tokens))
        return BYTES.decode(tokens)

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.feed(BYTE_IDS[0xFF]) for _ in range(500)]
    assert "".join(pieces) + detokenizer.flush() == "\ufffd" * 500
    assert max(decoded) < 20


@given(st.text(max_size=40))
def test_no_piece_shows_half_a_character(text):
    tokens = [BYTES.token_to_id(letter) for letter in _byte_letters(text)]
    detokenizer = Detokenizer(BYTES.decode)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == text
    assert all(text.startswith("".join(pieces[:count])) for count in range(len(pieces)))


def _byte_letters(text: str) -> str:
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return "".join(piece for piece, _ in encoded)


@pytest.mark.skipif(not SENTENCEPIECE.is_file(), reason="the shared stories260K model is not there")
@given(text=st.text(max_size=60))
def test_a_sentencepiece_vocabulary_keeps_its_spaces(text):
    tokenizer = Tokenizer.from_file(str(SENTENCEPIECE))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(tokenizer.decode)
    streamed = "".join(detokenizer.feed(token) for token in tokens) + detokenizer.flush()
    assert streamed == tokenizer.decode(tokens)


short_texts = st.text(alphabet="abc", max_size=20)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3)


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain twin: the first end of a stop string counts, and the longest that ends there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(short_texts, stops, st.data())
def test_stop_strings_do_not_depend_on_the_cuts(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    filtered = StopStrings(stops)
    result = "".join(map(filtered.feed, pieces)) + filtered.flush()
    assert (result, filtered.stopped) == cut_at_stop(text, stops)


@given(short_texts, stops)
def test_what_is_let_through_is_never_taken_back(text, stops):
    filtered, let_through = StopStrings(stops), ""
    for letter in text:
        let_through += filtered.feed(letter)
        assert cut_at_stop(text, stops)[0].startswith(let_through)


def test_special_tokens_leave_no_trace_and_stop_strings_end_the_answer():
    ids = [BYTES.token_to_id(letter) for letter in "oneSTOPtwo"]
    answer = AnswerText(BYTES.decode, ["STOP"], silent_tokens=frozenset({9999}))
    pieces = [answer.feed(token) for token in [*ids[:2], 9999, *ids[2:]]]
    assert "".join(pieces) + answer.flush() == "one"
    assert answer.stopped
