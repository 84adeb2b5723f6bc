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
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


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


class Connection:
    """One to a server of HTTP/1.1; an answer is over when its last chunk has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._head = b""
        self.is_reusable = False
        """Whether an answer was read to its end, and the server keeps the connection."""

    async def ask(self, request: bytes) -> bool:
        """False if the server has closed the connection."""
        self.is_reusable = False
        self._writer.write(request)
        try:
            self._head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        return True

    async def events(self) -> AsyncIterator[None]:
        """Yields for each one but the last. Raises RequestError for a refusal."""
        status, _, fields = self._head.lower().partition(b"\r\n")
        if _OK not in status:
            raise RequestError(f"{self._head.decode(errors='replace').strip()}: {(await self._reader.read(500))!r}")
        async for line in self._reader:
            if line.startswith(_EVENT + _END):
                break
            if line.startswith(_EVENT):
                yield
        if b"transfer-encoding: chunked" in fields and b"connection: close" not in fields:
            with contextlib.suppress(asyncio.IncompleteReadError):
                await self._reader.readuntil(_LAST_CHUNK)
                self.is_reusable = True

    async def aclose(self) -> None:
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()


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
    """`/v1/completions` as server-sent events, over connections that are kept for the next request."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model
        self._idle: list[Connection] = []

    async def tokens(self, prompt: Sequence[int], answer_tokens: int) -> AsyncIterator[None]:
        try:
            connection = await self._asked(self._request(prompt, answer_tokens))
            try:
                async for _ in connection.events():
                    yield
            finally:
                if connection.is_reusable:
                    self._idle.append(connection)
                else:
                    await connection.aclose()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise RequestError(str(error)) from error

    async def aclose(self) -> None:
        """End the connections that nobody uses."""
        while self._idle:
            await self._idle.pop().aclose()

    async def _asked(self, request: bytes) -> Connection:
        """The connection of the answer: the one that was used last, or a new one where the server has closed that."""
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(ConnectionError):
                if await connection.ask(request):
                    return connection
            await connection.aclose()
        connection = Connection(*await asyncio.open_connection("127.0.0.1", self._port))
        if not await connection.ask(request):
            await connection.aclose()
            raise RequestError("the server closed the connection without an answer")
        return connection

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
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
