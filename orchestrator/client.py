"""Talks to an orchestrator on behalf of a person at a terminal."""

import contextlib
from collections.abc import Iterator

import grpc

from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

CONNECT_TIMEOUT_S = 10.0


class ClientError(RuntimeError):
    """What the person should read: one line."""


@contextlib.contextmanager
def connect(server: str) -> Iterator[inference_pb2_grpc.InferenceStub]:
    """Raises ClientError if nobody answers at `server`; errors of calls inside become ClientErrors as well."""
    with grpc.insecure_channel(server) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            raise ClientError(f"nobody answers at {server}: is edgellm-serve running? (--server HOST:PORT)") from error
        try:
            yield inference_pb2_grpc.InferenceStub(channel)
        except grpc.RpcError as error:
            raise ClientError(_explain(error, server)) from error


def events(
    stub: inference_pb2_grpc.InferenceStub, request: inference_pb2.GenerateRequest
) -> Iterator[inference_pb2.Accepted | inference_pb2.Token | inference_pb2.Finished]:
    """The events of one request. Leaving early cancels it."""
    call = stub.Generate(request)
    try:
        for response in call:
            match response.WhichOneof("event"):
                case "accepted":
                    yield response.accepted
                case "token":
                    yield response.token
                case "finished":
                    yield response.finished
                case _:
                    pass
    finally:
        call.cancel()  # type: ignore[no-untyped-call]


def _explain(error: grpc.RpcError, server: str) -> str:
    if not isinstance(error, grpc.Call):
        return str(error)
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return f"the connection to {server} was lost ({error.details()})"
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            hints = [str(value) for key, value in error.trailing_metadata() if key == "retry-after-ms"]
            return f"{error.details()}" + (f" (in about {hints[0]} ms)" if hints else "")
        case _:
            return str(error.details())
