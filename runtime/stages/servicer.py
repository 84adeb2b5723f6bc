"""The receiving end of the stage exchange, over gRPC."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import grpc.aio

from edgellm.runtime.rpc import stage_pb2, stage_pb2_grpc
from edgellm.runtime.stages.messages import StageResult, StageStep, StepSource
from edgellm.runtime.stages.wire import result_to_proto, step_from_proto
from edgellm.runtime.streams import OpenStreams
from edgellm.runtime.tasks import race

_Context: TypeAlias = grpc.aio.ServicerContext[stage_pb2.StageStep, stage_pb2.StageResult]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ServicerHooks:
    """Who takes the steps."""

    on_step: Callable[[StageStep, StepSource], None]
    on_gone: Callable[[StepSource], None]
    """The source takes no results any more."""
    on_crash: Callable[[BaseException], None]
    """Given what nobody expected."""


class _Source:
    """One stream's way back."""

    def __init__(self) -> None:
        self._results: asyncio.Queue[StageResult] = asyncio.Queue()

    def answer(self, result: StageResult) -> None:
        self._results.put_nowait(result)

    async def write_to(self, context: _Context) -> None:
        while True:
            await context.write(result_to_proto(await self._results.get()))


class StageExchangeServicer(stage_pb2_grpc.StageExchangeServicer):
    """Reads steps as they come; results go back when they are there."""

    def __init__(self, hooks: ServicerHooks) -> None:
        self._hooks = hooks
        self.streams = OpenStreams()

    async def Steps(  # type: ignore[override]  # noqa: N802  # the generated base declares a generator
        self, request_iterator: object, context: _Context
    ) -> None:
        source = _Source()
        try:
            self.streams.enter()
            await race(self._read(context, source), source.write_to(context))
        except grpc.aio.AbortError:
            raise
        except (grpc.aio.InternalError, grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            _log.info("stage stream lost error=%r", error)
        except Exception as error:
            self._hooks.on_crash(error)
            raise
        finally:
            self._hooks.on_gone(source)

    async def _read(self, context: _Context, source: _Source) -> None:
        while isinstance(message := await context.read(), stage_pb2.StageStep):
            try:
                step = step_from_proto(message)
            except ValueError as error:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            self._hooks.on_step(step, source)
