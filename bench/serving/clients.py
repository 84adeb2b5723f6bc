"""Clients of each server's own streaming interface; prompts are token ids, and answers have a fixed length."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

import grpc

from bench.serving.observations import Observation
from edgellm.runtime.rpc import inference_pb2 as api
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

_OK: Final = b" 200 "
_EVENT: Final = b"data: "
_END: Final = b"[DONE]"


class RequestError(RuntimeError):
    """A server refused a request or broke off an answer."""


class Client(Protocol):
    """Asks one server; many requests at a time."""

    def tokens(self, prompt: Sequence[int], answer_tokens: int) -> AsyncIterator[None]:
        """Yields when a token arrives. Raises RequestError."""
        ...


async def observe(client: Client, prompt: Sequence[int], answer_tokens: int) -> Observation:
    """One request. Servers may send several tokens in one message, so their number is what was asked for. Raises
    RequestError."""
    started_s = time.perf_counter()
    arrivals_s = [time.perf_counter() - started_s async for _ in client.tokens(prompt, answer_tokens)]
    if not arrivals_s:
        raise RequestError("the answer has no token")
    return Observation(first_token_s=arrivals_s[0], last_token_s=arrivals_s[-1], tokens=answer_tokens)


class EdgellmClient:
    """`edgellm.v1.Inference` over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = InferenceStub(channel)

    async def tokens(self, prompt: Sequence[int], answer_tokens: int) -> AsyncIterator[None]:
        request = api.GenerateRequest(token_ids=api.TokenIds(ids=prompt), max_tokens=answer_tokens, ignore_eos=True)
        try:
            async for reply in self._stub.Generate(request):
                if reply.WhichOneof("event") == "token":
                    yield
        except grpc.RpcError as error:
            raise RequestError(str(error)) from error


class OpenAiClient:
    """`/v1/completions` as server-sent events, a connection per request."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    async def tokens(self, prompt: Sequence[int], answer_tokens: int) -> AsyncIterator[None]:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
            with contextlib.closing(writer):
                writer.write(self._request(prompt, answer_tokens))
                status = await reader.readline()
                if _OK not in status:
                    raise RequestError(f"{status.decode(errors='replace').strip()}: {(await reader.read(500))!r}")
                async for line in reader:
                    if line.startswith(_EVENT + _END):
                        return
                    if line.startswith(_EVENT):
                        yield
        except OSError as error:
            raise RequestError(str(error)) from error

    def _request(self, prompt: Sequence[int], answer_tokens: int) -> bytes:
        """`cache_prompt` is llama-server's, `ignore_eos` both servers' extension of the interface."""
        wanted = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        body = json.dumps(wanted).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
