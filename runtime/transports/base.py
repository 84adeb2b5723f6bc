"""The two ends of a transport: it carries payloads only; headers and acknowledgements always go over gRPC."""

from typing import Protocol

from edgellm.runtime.rpc import kv_pb2


class TransportError(Exception):
    """A transport that cannot be used between these two nodes, or a chunk that names memory outside of it."""


class Outgoing(Protocol):
    """A sender's end, shared by all transfers to one node."""

    name: str

    async def place(self, chunk: kv_pb2.KvChunk, payload: bytes) -> None:
        """Make the payload reachable for the receiver and say in `chunk` where; waits for room."""
        ...

    def release(self, chunk: kv_pb2.KvChunk) -> None:
        """The receiver has answered this chunk, or never will: its room may be used again."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """A receiver's end."""

    name: str

    def fetch(self, chunk: kv_pb2.KvChunk) -> bytes:
        """Private copy of a chunk's payload. Raises TransportError if it lies outside of what the sender shares."""
        ...
