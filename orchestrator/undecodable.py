"""Requests that are no valid protobuf (text that is not UTF-8, for one) are the client's mistake, and are told so."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from edgellm.runtime.rpc import inference_pb2

GENERATE = "/edgellm.v1.Inference/Generate"

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
AnyContext: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class RefuseUndecodable(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Answers INVALID_ARGUMENT where gRPC itself would say INTERNAL and log a traceback."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler = await continuation(handler_call_details)
        if handler_call_details.method != GENERATE:
            return handler
        generate: Any = handler.unary_stream

        async def checked(request: inference_pb2.GenerateRequest | DecodeError, context: AnyContext) -> None:
            if isinstance(request, DecodeError):
                message = f"the request cannot be decoded ({request}): all text must be valid UTF-8"
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
            await generate(request, context)

        return grpc.unary_stream_rpc_method_handler(
            cast(Any, checked), request_deserializer=_decode, response_serializer=handler.response_serializer
        )


def _decode(data: bytes) -> inference_pb2.GenerateRequest | DecodeError:
    try:
        return inference_pb2.GenerateRequest.FromString(data)
    except DecodeError as error:
        return error
