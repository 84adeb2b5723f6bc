"""Room in a ring of bytes: taken in order, given back in any order."""

from collections import OrderedDict


class RingSpace:
    """Spans of `size` bytes. A span never wraps; room comes back when all older spans were given back too."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._spans: OrderedDict[int, tuple[int, bool]] = OrderedDict()
        """Offset -> (length, given back), oldest first."""

    def take(self, length: int) -> int | None:
        """Offset of a new span of `length` > 0 bytes, or None if there is no room now.

        Raises ValueError if the ring could never hold it.
        """
        if not 0 < length <= self.size:
            raise ValueError(f"a span of {length} bytes does not fit a ring of {self.size}")
        offset = self._place(length)
        if offset is not None:
            self._spans[offset] = (length, False)
        return offset

    def give_back(self, offset: int) -> None:
        """Raises KeyError if no span starts there."""
        length, _ = self._spans[offset]
        self._spans[offset] = (length, True)
        while self._spans and next(iter(self._spans.values()))[1]:
            self._spans.popitem(last=False)

    def _place(self, length: int) -> int | None:
        if not self._spans:
            return 0
        tail = next(iter(self._spans))
        last = next(reversed(self._spans))
        head = last + self._spans[last][0]
        if head <= tail:
            return head if head + length <= tail else None
        if head + length <= self.size:
            return head
        return 0 if length <= tail else None
