"""The client side of the orchestrator: edgellm.v1.Inference."""

import asyncio
from typing import Any

import grpc
import grpc.aio

from edgellm.orchestrator.answers import Answer, Answers, SupersededError
from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.cluster_status import events_to_proto, nodes_to_proto
from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.events import RequestEnded
from edgellm.orchestrator.core.values import RequestId, RequestSpec
from edgellm.orchestrator.deadline import LastingDeadline
from edgellm.orchestrator.driver import Driver
from edgellm.orchestrator.journal import Accepted
from edgellm.orchestrator.journal_writer import RESUMABLE_S
from edgellm.orchestrator.text import AnswerText
from edgellm.orchestrator.validation import InvalidRequestError, RequestReader
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
ResumeContext = grpc.aio.ServicerContext[inference_pb2.ResumeRequest, inference_pb2.GenerateResponse]
AnyContext = grpc.aio.ServicerContext[Any, Any]

STOP_PATIENCE_S = 1.0
_REJECTIONS = {
    "duplicate": grpc.StatusCode.ALREADY_EXISTS,
    "impossible": grpc.StatusCode.INVALID_ARGUMENT,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    def __init__(self, driver: Driver, bundle: ServedBundle, reader: RequestReader) -> None:
        self._driver = driver
        self._bundle = bundle
        self._reader = reader
        self.answers = Answers(driver, self._new_text)
        self._streams: set[asyncio.Task[Any]] = set()
        self._is_stopping = False

    async def stop(self) -> None:
        """End all streams, each with a word. To be called before the server stops, which cancels them without one."""
        self._is_stopping = True
        self.answers.end_readers()
        if self._streams:
            await asyncio.wait(self._streams, timeout=STOP_PATIENCE_S)

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        """Writes instead of yielding, so that a disconnect is raised here, wherever this stands."""
        answer = self.answers.begin(await self._read(request, context))
        reader = answer.open()
        try:
            verdict = await answer.wait_for_verdict()
            if isinstance(verdict, commands.RejectRequest):
                await _reject(verdict, context)
            await self._stream(answer, reader, 0, context)
        finally:
            self.answers.leave(answer, reader, answer.accepted.keep_s)

    async def Resume(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.ResumeRequest, context: ResumeContext
    ) -> None:
        answer = self.answers.get(RequestId(request.request_id))
        if answer is None:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no request {request.request_id!r}, or it ended more than {RESUMABLE_S / 60:.0f} minutes ago",
            )
        reader = answer.open()
        try:
            await self._stream(answer, reader, request.from_index, context)
        finally:
            self.answers.leave(answer, reader, answer.accepted.keep_s)

    async def _stream(
        self, answer: Answer, reader: int, from_index: int, context: GenerateContext | ResumeContext
    ) -> None:
        self._enter_stream()
        try:
            await context.write(inference_pb2.GenerateResponse(accepted=_accepted(answer.accepted.spec)))
            async for response in answer.read(reader, from_index):
                await context.write(response)
        except SupersededError:
            if self._is_stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "edgellm-serve is stopping")
            await context.abort(grpc.StatusCode.ABORTED, "the answer was resumed on another stream")

    def _enter_stream(self) -> None:
        """The task that handles it is known until it has ended, status and all."""
        stream = asyncio.current_task()
        if stream is not None:
            self._streams.add(stream)
            stream.add_done_callback(self._streams.discard)

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: AnyContext
    ) -> inference_pb2.CancelResponse:
        request_id = RequestId(request.request_id)
        known = request_id in self._driver.core.state.requests
        self._driver.post(RequestEnded(request_id=request_id, reason="cancelled"))
        return inference_pb2.CancelResponse(cancelled=known)

    async def GetCluster(  # noqa: N802
        self, request: inference_pb2.GetClusterRequest, context: AnyContext
    ) -> inference_pb2.GetClusterResponse:
        state = self._driver.core.state
        counts = self._driver.request_counts()
        return inference_pb2.GetClusterResponse(
            model=self._bundle.index.model.id,
            bundle_sha256=self._bundle.sha256,
            nodes=nodes_to_proto(state, self._driver.clock()),
            finished=state.finished_count,
            queued=counts["queued"],
            prefilling=counts["prefilling"],
            decoding=counts["decoding"],
            events=events_to_proto(self._driver),
        )

    async def _read(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> Accepted:
        """In a thread: a template and a tokenizer may take long over a long prompt, and nobody else may wait for it."""
        try:
            spec = await asyncio.to_thread(self._reader.read, request, self._driver.clock())
        except InvalidRequestError as error:
            unknown = error.kind == "unknown_model"
            code = grpc.StatusCode.NOT_FOUND if unknown else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))
        return Accepted(
            spec=spec,
            stop=tuple(request.stop),
            keep_s=request.keep_ms / 1e3,
            deadline=LastingDeadline.at(spec.deadline_s) if spec.deadline_s is not None else None,
        )

    def _new_text(self, accepted: Accepted) -> AnswerText:
        silent_tokens = self._reader.tokenizer.special_token_ids | frozenset(accepted.spec.generation.stop_token_ids)
        return AnswerText(self._reader.tokenizer.decode, accepted.stop, silent_tokens)


async def _reject(rejection: commands.RejectRequest, context: GenerateContext) -> None:
    if rejection.kind == "overloaded":
        context.set_trailing_metadata((("retry-after-ms", str(rejection.retry_after_ms)),))
    await context.abort(_REJECTIONS[rejection.kind], rejection.message)


def _accepted(spec: RequestSpec) -> inference_pb2.Accepted:
    return inference_pb2.Accepted(
        request_id=spec.request_id, prompt_tokens=len(spec.prompt), seed=spec.generation.sampling.seed
    )
