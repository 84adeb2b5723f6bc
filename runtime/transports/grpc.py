"""Payloads inside the gRPC messages: between any two nodes that reach each other."""

from edgellm.runtime.rpc import kv_pb2
from edgellm.runtime.transports.base import TransportError


class GrpcOutgoing:
    name = "grpc"

    async def place(self, chunk: kv_pb2.KvChunk, payload: bytes) -> None:
        chunk.inline_payload = payload

    def release(self, chunk: kv_pb2.KvChunk) -> None:
        """gRPC has its own copy."""

    def close(self) -> None:
        """The channel belongs to the link."""


class GrpcIncoming:
    name = "grpc"

    def fetch(self, chunk: kv_pb2.KvChunk) -> bytes:
        if chunk.WhichOneof("payload") != "inline_payload":
            raise TransportError("a chunk of the grpc transport has no inline payload")
        return chunk.inline_payload
