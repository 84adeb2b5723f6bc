"""Tokens to text, one token at a time: no broken characters, stop strings held back and cut."""

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
"""What decoders put for bytes that are no character (yet)."""
MAX_CHARACTER_BYTES = 4
MAX_HELD_TOKENS = 2 * MAX_CHARACTER_BYTES


class Detokenizer:
    """Gives the text that each token makes final. All pieces together equal decoding all tokens at once.

    A decoder may treat the first token of a call differently (drop its leading space), so new tokens are decoded
    behind a few old ones and the old text is cut off. Text that ends in a replacement character may still change and
    waits, but not for longer than a character can take: bytes that are none cost no more than others.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._context = 0
        """Tokens from here on are decoded again for each new one."""
        self._emitted = 0
        """Tokens up to here are text already."""
        self._context_text = ""
        """Text of tokens [context : emitted]."""

    def feed(self, token_id: int) -> str:
        self._tokens.append(token_id)
        text = self._decode(self._tokens[self._context :])
        if not text.endswith(REPLACEMENT) and text.startswith(self._context_text):
            return self._advance(text, len(self._tokens))
        return self._settle(text) if len(self._tokens) - self._emitted > MAX_HELD_TOKENS else ""

    def flush(self) -> str:
        """The rest, with replacement characters where a character was never completed."""
        return self._advance(self._decode(self._tokens[self._context :]), len(self._tokens))

    def _settle(self, text: str) -> str:
        """What no further token can change: a cut in front of the last four tokens that is not inside of a character.

        A decoder may also decide on all bytes in a row at once; then there is no such cut, and all of it is broken.
        """
        for end in range(len(self._tokens) - MAX_CHARACTER_BYTES, self._emitted, -1):
            settled = self._decode(self._tokens[self._context : end])
            if settled.startswith(self._context_text) and text.startswith(settled):
                return self._advance(settled, end)
        return self._advance(text, len(self._tokens))

    def _advance(self, text: str, end: int) -> str:
        """`text`: of tokens [context : end]."""
        piece = text[len(self._context_text) :]
        if piece:
            self._context = self._emitted
            self._emitted = end
            self._context_text = self._decode(self._tokens[self._context : self._emitted])
        return piece


class StopStrings:
    """Lets text through up to the first stop string to be completed (the longest of several that end together).

    Text that may be the beginning of a stop string is held back. The result does not depend on how the text was cut
    into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Text that is now final; `stopped` tells whether a stop string was seen."""
        if self.stopped:
            return ""
        self._held += piece
        cut = self._cut()
        if cut is not None:
            self.stopped = True
            return self._release(cut)
        return self._release(len(self._held) - self._possible_start())

    def flush(self) -> str:
        """What was held back, unless a stop string was seen: the text is over."""
        return "" if self.stopped else self._release(len(self._held))

    def _cut(self) -> int | None:
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        longest = min(max((len(stop) - 1 for stop in self._stops), default=0), len(self._held))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        return released


class AnswerText:
    """The text of one answer: special and stop tokens leave no trace, stop strings end it."""

    def __init__(
        self, decode: Callable[[Sequence[int]], str], stops: Sequence[str], silent_tokens: frozenset[int]
    ) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopStrings(stops)
        self._silent_tokens = silent_tokens

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def feed(self, token_id: int) -> str:
        if token_id in self._silent_tokens:
            return ""
        return self._stops.feed(self._detokenizer.feed(token_id))

    def flush(self) -> str:
        return self._stops.feed(self._detokenizer.flush()) + self._stops.flush()
