"""The server's side of simulated gRPC: servers and contexts that behave as those of `grpc.aio`."""

import asyncio
import inspect
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio

from edgellm.orchestrator.sim.channels import until
from edgellm.orchestrator.sim.loop import SimulatedLoop, current_process
from edgellm.orchestrator.sim.network import Network
from edgellm.orchestrator.sim.rpc import EOF, OK, Frame, Listener, Metadata, Rpc, Status


class Context:
    """What a servicer is given beside the request."""

    def __init__(self, rpc: Rpc, handler: Any) -> None:
        self._rpc = rpc
        self._handler = handler
        self._trailing: Metadata = ()
        self.status = OK

    async def read(self) -> Any:
        message = await self._rpc.to_server.get()
        if isinstance(message, Frame):
            return message.parse(self._handler.request_deserializer)
        return EOF

    async def write(self, response: Any) -> None:
        await until(self._rpc.send_response(self._handler.response_serializer(response)))

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        self.status = Status(code=code, details=details, trailing=self._trailing + tuple(trailing_metadata))
        raise grpc.aio.AbortError("Locally aborted.")

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self._trailing = tuple(metadata)

    def invocation_metadata(self) -> Metadata:
        return self._rpc.metadata

    def cancelled(self) -> bool:
        return self._rpc.to_server.status not in (None, OK)

    def __aiter__(self) -> "Context":
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is EOF:
            raise StopAsyncIteration
        return message


class SimulatedServer:
    """What `grpc.aio.server` gives; listens at its process's port."""

    def __init__(
        self, loop: SimulatedLoop, network: Network, listeners: dict[int, Listener], interceptors: Sequence[Any]
    ) -> None:
        self.process = current_process()
        self._loop = loop
        self._listeners = listeners
        self._interceptors = interceptors
        self._port = network.port_of(self.process.name)
        self._handlers: list[Any] = []
        self._running: dict[asyncio.Task[None], Rpc] = {}

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """They are among the generic ones."""

    def add_insecure_port(self, address: str) -> int:
        return self._port

    async def start(self) -> None:
        self._listeners[self._port] = self

    async def stop(self, grace: float | None) -> None:
        """Without grace: whoever still listens here is reset."""
        if self._listeners.get(self._port) is self:
            del self._listeners[self._port]
        for task, rpc in list(self._running.items()):
            rpc.finish(Status(code=grpc.StatusCode.UNAVAILABLE, details="the server is stopping"))
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def accept(self, rpc: Rpc) -> None:
        """Called by the network."""
        task = self._loop.spawn(self.process, self._serve(rpc))
        rpc.handler = task
        self._running[task] = rpc
        task.add_done_callback(self._running.pop, context=self.process.context)

    async def _serve(self, rpc: Rpc) -> None:
        handler = await self._find(rpc)
        context = Context(rpc, handler)
        try:
            await _run(handler, context)
        except grpc.aio.AbortError:
            pass
        except Exception as error:  # noqa: BLE001  # a servicer that raises is a fault of the program
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            self._loop.call_exception_handler({"message": f"{rpc.method} of {self.process.name}", "exception": error})
        rpc.finish(context.status)

    async def _find(self, rpc: Rpc) -> Any:
        details: Any = _Details(rpc.method)

        async def found(_: object) -> Any:
            return next(found for one in self._handlers if (found := one.service(details)) is not None)

        continuation = found
        for interceptor in self._interceptors:
            continuation = _through(interceptor, continuation)
        return await continuation(details)


class _Details:
    def __init__(self, method: str) -> None:
        self.method = method
        self.invocation_metadata: Metadata = ()


def _through(interceptor: Any, continuation: Any) -> Any:
    async def intercepted(details: Any) -> Any:
        return await interceptor.intercept_service(continuation, details)

    return intercepted


async def _run(handler: Any, context: Context) -> None:
    """Give the request to the servicer's method, which writes, yields or returns the answers."""
    kinds = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    method = next(one for one in kinds if one is not None)
    request = context if handler.request_streaming else await context.read()
    if request is EOF:
        return
    answers = method(request, context)
    if inspect.isasyncgen(answers):
        async for answer in answers:
            await context.write(answer)
    elif (answer := await answers) is not None:
        await context.write(answer)
