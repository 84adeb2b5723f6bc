"""The client side of the orchestrator: edgellm.v1.Inference."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio

from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.events import RequestEnded
from edgellm.orchestrator.core.nodes import Node
from edgellm.orchestrator.core.values import RequestId, RequestSpec, SampledToken
from edgellm.orchestrator.driver import ClientInbox, Driver
from edgellm.orchestrator.text import AnswerText
from edgellm.orchestrator.validation import InvalidRequestError, RequestReader
from edgellm.orchestrator.wire_out import finished_to_proto
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateResponse]
AnyContext = grpc.aio.ServicerContext[Any, Any]

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

    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        """Writes instead of yielding, so that a disconnect is raised here, wherever this stands."""
        spec = await self._read(request, context)
        inbox = self._driver.submit(spec)
        first = inbox.get_nowait()
        if isinstance(first, commands.RejectRequest):
            await _reject(first, context)
        try:
            await context.write(inference_pb2.GenerateResponse(accepted=_accepted(spec)))
            answer = AnswerText(self._reader.tokenizer.decode, request.stop, self._silent_tokens(spec))
            await self._answer(spec, inbox, answer, context)
        finally:
            self._driver.end(spec, inbox, "cancelled")

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
        now_s = self._driver.clock()
        return inference_pb2.GetClusterResponse(
            model=self._bundle.index.model.id,
            bundle_sha256=self._bundle.sha256,
            nodes=[_node_status(node, now_s) for node in state.nodes],
            finished=state.finished_count,
            **self._driver.request_counts(),
        )

    async def _read(self, request: inference_pb2.GenerateRequest, context: GenerateContext) -> RequestSpec:
        """In a thread: a template and a tokenizer may take long over a long prompt, and nobody else may wait for it."""
        try:
            return await asyncio.to_thread(self._reader.read, request, self._driver.clock())
        except InvalidRequestError as error:
            unknown = error.kind == "unknown_model"
            code = grpc.StatusCode.NOT_FOUND if unknown else grpc.StatusCode.INVALID_ARGUMENT
            await context.abort(code, str(error))

    def _silent_tokens(self, spec: RequestSpec) -> frozenset[int]:
        return self._reader.tokenizer.special_token_ids | frozenset(spec.generation.stop_token_ids)

    async def _answer(
        self, spec: RequestSpec, inbox: ClientInbox, answer: AnswerText, context: GenerateContext
    ) -> None:
        """Tokens and the end of one answer. A stop string ends it here; what comes after is dropped."""
        sent = 0
        while True:
            match await inbox.get():
                case commands.EmitToken(token=token) if not answer.stopped:
                    sent += 1
                    text = answer.feed(token.token_id)
                    if answer.stopped:
                        self._driver.end(spec, inbox, "stop")
                    await context.write(_token(token, text))
                case commands.FinishRequest(reason=reason, message=message, stats=stats):
                    text = answer.flush()
                    stats = replace(stats, generated_tokens=sent)
                    finished = finished_to_proto("stop" if answer.stopped else reason, message, stats, text)
                    await context.write(inference_pb2.GenerateResponse(finished=finished))
                    return
                case _:
                    pass


async def _reject(rejection: commands.RejectRequest, context: GenerateContext) -> None:
    if rejection.kind == "overloaded":
        context.set_trailing_metadata((("retry-after-ms", str(rejection.retry_after_ms)),))
    await context.abort(_REJECTIONS[rejection.kind], rejection.message)


def _accepted(spec: RequestSpec) -> inference_pb2.Accepted:
    return inference_pb2.Accepted(
        request_id=spec.request_id, prompt_tokens=len(spec.prompt), seed=spec.generation.sampling.seed
    )


def _token(token: SampledToken, text: str) -> inference_pb2.GenerateResponse:
    message = inference_pb2.Token(index=token.index, token_id=token.token_id, text=text, logprob=token.logprob)
    return inference_pb2.GenerateResponse(token=message)


def _node_status(node: Node, now_s: float) -> inference_pb2.NodeStatus:
    """Free blocks are what the node itself counts, so that a leak shows."""
    profile, load = node.profile, node.load
    return inference_pb2.NodeStatus(
        node_id=profile.node_id,
        incarnation=node.incarnation,
        role=profile.role,
        device_class=profile.device_class,
        engines=[engine.name for engine in profile.engines],
        address=profile.exchange_address,
        state=node.state,
        running=load.running,
        waiting=load.waiting,
        kv_blocks_total=profile.kv_blocks,
        kv_blocks_free=load.kv_blocks_free,
        rss_bytes=load.rss_bytes,
        rss_shared_bytes=load.rss_shared_bytes,
        steps=load.steps,
        pid=profile.pid,
        heartbeat_age_ms=1000 * (now_s - node.last_beat_s),
    )
