"""Talks to an orchestrator on behalf of a person at a terminal."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeAlias

import grpc

from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

CONNECT_TIMEOUT_S = 10.0
REFUSED_TIMEOUT_S = 1.5
"""For a server whose port is not open yet: from the first try that failed outright."""
CANCEL_TIMEOUT_S = 1.0
RECONNECT_TIMEOUT_S = 30.0
"""An answer whose stream was lost is asked for again for so long."""
RECONNECT_PAUSE_S = 0.1
_CHANNEL_OPTIONS = [
    *((f"grpc.{which}_reconnect_backoff_ms", 100) for which in ("initial", "max")),
    ("grpc.min_reconnect_backoff_ms", round(1000 * CONNECT_TIMEOUT_S)),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
"""Reconnect soon, but wait for a server that is slow to answer (gRPC names that time so); and notice within ten
seconds that packets vanish on the way."""
_LOSSES = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)
"""The last two are what gRPC makes of damaged bytes. Where they are a fault of the server, asking again says so too."""

AnswerEvent: TypeAlias = inference_pb2.Accepted | inference_pb2.Token | inference_pb2.Finished
AnswerEvents: TypeAlias = Generator[AnswerEvent, None, None]
"""To be closed before the connection is."""
_Call: TypeAlias = Any  # generated stubs do not say that their calls can be cancelled


class ClientError(RuntimeError):
    """What the person should read: one line."""


@contextlib.contextmanager
def connect(server: str) -> Iterator[inference_pb2_grpc.InferenceStub]:
    """Raises ClientError if nobody answers at `server`; errors of calls inside become ClientErrors as well."""
    with grpc.insecure_channel(server, options=_CHANNEL_OPTIONS) as channel:
        if not _becomes_ready(channel):
            raise ClientError(f"nobody answers at {server}: is edgellm-serve running? (--server HOST:PORT)")
        try:
            yield inference_pb2_grpc.InferenceStub(channel)
        except grpc.RpcError as error:
            raise ClientError(_explain(error, server)) from error


def _becomes_ready(channel: grpc.Channel) -> bool:
    """Wait in a queue, as Ctrl-C must not come between two lines of gRPC's own wait, which holds a lock."""
    states = queue.SimpleQueue[grpc.ChannelConnectivity]()

    def note(state: grpc.ChannelConnectivity) -> None:
        if state is grpc.ChannelConnectivity.READY:
            channel.unsubscribe(note)
        states.put(state)

    channel.subscribe(note, try_to_connect=True)
    deadline_s = time.monotonic() + CONNECT_TIMEOUT_S
    with contextlib.suppress(queue.Empty):
        while (state := states.get(timeout=max(0.0, deadline_s - time.monotonic()))) != grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                deadline_s = min(deadline_s, time.monotonic() + REFUSED_TIMEOUT_S)
        return True
    return False


def events(stub: inference_pb2_grpc.InferenceStub, request: inference_pb2.GenerateRequest) -> AnswerEvents:
    """The events of one request, each token once, over as many streams as it takes. Leaving early cancels it."""
    return _Follower(stub, stub.Generate(request), 0).events()


def resumed_events(stub: inference_pb2_grpc.InferenceStub, request_id: str, from_index: int) -> AnswerEvents:
    """The same for a request that another client began, from a token on."""
    return _Follower(stub, _resume(stub, request_id, from_index), from_index).events()


def _resume(stub: inference_pb2_grpc.InferenceStub, request_id: str, from_index: int) -> _Call:
    return stub.Resume(inference_pb2.ResumeRequest(request_id=request_id, from_index=from_index))


class _Follower:
    """Follows one answer, and takes it up again where its stream was lost."""

    def __init__(self, stub: inference_pb2_grpc.InferenceStub, call: _Call, index: int) -> None:
        self._stub = stub
        self._call = call
        self._index = index
        """Of the next token."""
        self._request_id = ""
        self._finished = False
        self._lost_s: float | None = None

    def events(self) -> AnswerEvents:
        try:
            while not self._finished:
                yield from self._read()
                if not self._finished:
                    self._take_up_again()
        finally:
            self._call.cancel()
            if not self._finished:
                self._cancel()

    def _read(self) -> Iterator[AnswerEvent]:
        """Until the end of the stream, or its loss. Raises RpcError for any other reason, and after too long."""
        try:
            for response in _arrivals(self._call):
                self._lost_s = None
                yield from self._note(response)
        except grpc.RpcError as error:
            lost = isinstance(error, grpc.Call) and error.code() in _LOSSES
            self._lost_s = time.monotonic() if self._lost_s is None else self._lost_s
            if not lost or not self._request_id or time.monotonic() - self._lost_s > RECONNECT_TIMEOUT_S:
                raise

    def _note(self, response: inference_pb2.GenerateResponse) -> Iterator[AnswerEvent]:
        match response.WhichOneof("event"):
            case "accepted":
                if not self._request_id:
                    yield response.accepted
                self._request_id = response.accepted.request_id
            case "token":
                self._index = response.token.index + 1
                yield response.token
            case "finished":
                self._finished = True
                yield response.finished
            case _:
                pass

    def _take_up_again(self) -> None:
        time.sleep(RECONNECT_PAUSE_S)
        self._call = _resume(self._stub, self._request_id, self._index)

    def _cancel(self) -> None:
        """Its client is gone for good, and says so: the server would keep the request for a while."""
        if self._request_id:
            with contextlib.suppress(grpc.RpcError):
                self._stub.Cancel(inference_pb2.CancelRequest(request_id=self._request_id), timeout=CANCEL_TIMEOUT_S)


def _arrivals(call: _Call) -> Iterator[inference_pb2.GenerateResponse]:
    """The responses of a stream, read by a thread of its own.

    Ctrl-C raises in the main thread at any line, and gRPC's iterator does not bear that between two of its own: the
    lock it thinks it holds is not held. A `SimpleQueue` waits in one piece.
    """
    arrivals = queue.SimpleQueue[inference_pb2.GenerateResponse | grpc.RpcError | None]()
    threading.Thread(target=_pump, args=(call, arrivals.put), daemon=True).start()
    while (arrival := arrivals.get()) is not None:
        if isinstance(arrival, grpc.RpcError):
            raise arrival
        yield arrival


def _pump(call: _Call, put: Callable[[inference_pb2.GenerateResponse | grpc.RpcError | None], None]) -> None:
    try:
        for response in call:
            put(response)
    except grpc.RpcError as error:
        put(error)
    finally:
        put(None)


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
