"""The two ends of a transport: it carries payloads only; headers and acknowledgements always go over gRPC."""

from typing import Protocol, TypeAlias

from edgellm.runtime.rpc import kv_pb2

Carrier: TypeAlias = kv_pb2.KvChunk | kv_pb2.KvCopyMessage
"""Messages that hold a payload, or say where it is."""

Payload: TypeAlias = bytes | memoryview
"""Of bytes."""


class TransportError(Exception):
    """A transport that cannot be used between these two nodes, or a chunk that names memory outside of it."""


class Outgoing(Protocol):
    """A sender's end, shared by all transfers to one node."""

    name: str

    async def place(self, chunk: Carrier, payload: Payload) -> None:
        """Make the payload reachable for the receiver and say in `chunk` where; waits for room."""
        ...

    def release(self, chunk: Carrier) -> None:
        """The receiver has answered this chunk, or never will: its room may be used again."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """A receiver's end."""

    name: str

    def fetch(self, chunk: Carrier) -> bytes:
        """Private copy of a chunk's payload. Raises TransportError if it lies outside of what the sender shares."""
        ...
