"""Who has shaken hands with this node, and through what its payloads arrive."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgellm.runtime.transports.base import Incoming


@dataclass(kw_only=True, eq=False)
class Session:
    """One handshake."""

    node_id: str
    """Of the sender."""
    incoming: Incoming
    streams: int = 0
    """Push streams that are open."""


class SessionsFullError(Exception):
    """Every session that may be open has streams."""


class Sessions:
    """At most `limit` handshakes. A sender whose session was dropped is refused once, and shakes hands again."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._by_name: dict[str, Session] = {}

    def open(self, name: str, session: Session) -> None:
        """Enter a handshake in place of the sender's idle ones, and of the oldest idle ones where there are too many.

        A sender shakes hands again when it was restarted or lost its link: what it shared before is kept for nobody.
        Raises SessionsFullError.
        """
        idle = [
            (known, other.node_id == session.node_id) for known, other in self._by_name.items() if not other.streams
        ]
        for known, is_own in sorted(idle, key=lambda one: not one[1]):
            if is_own or len(self._by_name) >= self._limit:
                del self._by_name[known]
        if len(self._by_name) >= self._limit:
            raise SessionsFullError(f"{self._limit} senders are sending to this node, which is the limit")
        self._by_name[name] = session

    def get(self, name: str) -> Session | None:
        return self._by_name.get(name)

    @contextmanager
    def stream(self, name: str, session: Session) -> Iterator[None]:
        """Count a stream while it is open; the session is forgotten when the last of its streams breaks."""
        session.streams += 1
        ended = False
        try:
            yield
            ended = True
        finally:
            session.streams -= 1
            if not ended and session.streams == 0 and self._by_name.get(name) is session:
                del self._by_name[name]


def session_name(node_id: str, ring_name: str) -> str:
    """Names one handshake, in the metadata of its Push streams."""
    return f"{node_id}/{ring_name}"
