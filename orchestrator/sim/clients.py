"""The clients of a simulated cluster: each asks once, comes back when its stream breaks, and checks every token."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import grpc
import grpc.aio

from edgellm.engines.sampling import SamplingParams
from edgellm.engines.spec import Phase
from edgellm.orchestrator.sim.loop import SimulationError
from edgellm.orchestrator.sim.toy import VOCAB, Oracle
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

KEEP_MS: Final = 30_000
"""For which the orchestrator keeps a request whose client lost its stream."""
_RETRY_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one client wants, and when; it takes it back at `cancel_s`."""

    name: str
    at_s: float
    prompt_tokens: int
    max_tokens: int
    temperature: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    deadline_s: float | None = None
    """After `at_s`."""
    allow_degraded: bool = False
    cancel_s: float | None = None

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        rng = random.Random(self.name)
        return tuple(rng.randrange(VOCAB) for _ in range(self.prompt_tokens))

    @property
    def request(self) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            request_id=self.name,
            token_ids=inference_pb2.TokenIds(ids=self.prompt),
            sampling=inference_pb2.SamplingParams(seed=self.seed, temperature=self.temperature),
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=True,
            deadline_ms=0 if self.deadline_s is None else round(1e3 * self.deadline_s),
            allow_degraded_prefill=self.allow_degraded,
            keep_ms=KEEP_MS,
        )

    @property
    def seed(self) -> int:
        return 1000 * self.prompt_tokens + self.max_tokens

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(seed=self.seed, temperature=self.temperature)


@dataclass(kw_only=True, eq=False)
class Client:
    """Raises SimulationError from `run` as soon as what it is told is wrong."""

    ask: Ask
    num_layers: int
    now_s: Callable[[], float]
    check: bool = True
    """Whether to compare each token with an oracle's."""
    tokens: list[int] = field(default_factory=list)
    accepted: bool = False
    rejected: bool = False
    cancelled: bool = False
    finished: inference_pb2.Finished | None = None

    def __post_init__(self) -> None:
        phases: tuple[Phase, ...] = ("prefill", "decode") if self.ask.allow_degraded else ("prefill",)
        self._oracles = [Oracle(self.ask.prompt, self.num_layers, read_by=phase) for phase in phases]

    @property
    def is_over(self) -> bool:
        return self.rejected or self.finished is not None

    async def run(self, orchestrator: str) -> None:
        """From the request to its end, over as many streams as it takes."""
        await asyncio.sleep(self.ask.at_s - self.now_s())
        async with grpc.aio.insecure_channel(orchestrator) as channel:
            stub: Any = InferenceStub(channel)
            cancelling = asyncio.create_task(self._cancel(stub))
            try:
                while not self.is_over:
                    await self._listen(stub)
            finally:
                cancelling.cancel()

    async def _listen(self, stub: Any) -> None:
        """One stream, to its end."""
        call = stub.Generate(self.ask.request)
        if self.accepted:
            call = stub.Resume(inference_pb2.ResumeRequest(request_id=self.ask.name, from_index=len(self.tokens)))
        try:
            async for answer in call:
                self._take(answer)
        except grpc.aio.AioRpcError as error:
            self._broken(error)
            await asyncio.sleep(_RETRY_S)

    def _broken(self, error: grpc.aio.AioRpcError) -> None:
        match error.code():
            case grpc.StatusCode.UNAVAILABLE:
                pass
            case grpc.StatusCode.ALREADY_EXISTS:
                self.accepted = True
            case grpc.StatusCode.RESOURCE_EXHAUSTED | grpc.StatusCode.INVALID_ARGUMENT:
                self._require(not self.accepted, f"rejected after it was accepted: {error.details()}")
                self.rejected = True
            case code:
                raise SimulationError(f"{self.ask.name} was answered {code.name}: {error.details()}")

    def _take(self, answer: inference_pb2.GenerateResponse) -> None:
        match answer.WhichOneof("event"):
            case "accepted":
                self.accepted = True
            case "token":
                self._take_token(answer.token)
            case "finished":
                self._take_end(answer.finished)

    def _take_token(self, token: inference_pb2.Token) -> None:
        index = len(self.tokens)
        self._require(self.finished is None, f"token {token.index} after the end")
        self._require(token.index == index, f"token {token.index} where {index} was due")
        self._require(not self._is_complete(), f"token {index} after the last one")
        self.tokens.append(token.token_id)
        if not self.check:
            return
        right = {oracle.next(self.ask.sampling) for oracle in self._oracles}
        self._require(token.token_id in right, f"{token.token_id} as token {index}, not {right}")
        for oracle in self._oracles:
            oracle.feed(token.token_id)

    def _take_end(self, finished: inference_pb2.Finished) -> None:
        self._require(self.finished is None, "a second end")
        self.finished = finished
        ask = self.ask
        match finished.reason:
            case inference_pb2.FINISH_REASON_STOP | inference_pb2.FINISH_REASON_LENGTH:
                self._require(self._is_complete(), f"its end after {len(self.tokens)} tokens")
            case inference_pb2.FINISH_REASON_CANCELLED:
                self._require(self.cancelled, "cancelled, but not by itself")
            case inference_pb2.FINISH_REASON_DEADLINE:
                late = ask.deadline_s is not None and self.now_s() >= ask.at_s + ask.deadline_s
                self._require(late, "late before its deadline")
            case _:
                raise SimulationError(f"{ask.name} failed: {finished.message}")

    def _is_complete(self) -> bool:
        stopped = bool(self.tokens) and self.tokens[-1] in self.ask.stop_token_ids
        return stopped or len(self.tokens) == self.ask.max_tokens

    async def _cancel(self, stub: Any) -> None:
        if self.ask.cancel_s is None:
            return
        await asyncio.sleep(self.ask.cancel_s - self.now_s())
        self.cancelled = True
        while True:
            try:
                await stub.Cancel(inference_pb2.CancelRequest(request_id=self.ask.name))
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(_RETRY_S)

    def _require(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise SimulationError(f"{self.ask.name} was given {otherwise}")
