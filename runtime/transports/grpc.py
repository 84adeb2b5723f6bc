"""Payloads inside the gRPC messages: between any two nodes that reach each other."""

from edgellm.runtime.transports.base import Carrier, Payload, TransportError


class GrpcOutgoing:
    name = "grpc"

    async def place(self, chunk: Carrier, payload: Payload) -> None:
        chunk.inline_payload = bytes(payload)

    def release(self, chunk: Carrier) -> None:
        """gRPC has its own copy."""

    def close(self) -> None:
        """The channel belongs to the link."""


class GrpcIncoming:
    name = "grpc"

    def fetch(self, chunk: Carrier) -> bytes:
        if chunk.WhichOneof("payload") != "inline_payload":
            raise TransportError("a chunk of the grpc transport has no inline payload")
        return chunk.inline_payload
