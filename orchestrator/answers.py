"""Answers as clients see them, kept apart from any one connection: who lost its stream takes the answer up again."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Literal

from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.events import RequestEnded
from edgellm.orchestrator.core.values import RecoveredRequest, RequestId
from edgellm.orchestrator.driver import ClientEvent, Driver
from edgellm.orchestrator.journal import Accepted, Written
from edgellm.orchestrator.journal_writer import RESUMABLE_S
from edgellm.orchestrator.text import AnswerText
from edgellm.orchestrator.wire_out import finished_to_proto, token_to_proto
from edgellm.runtime.rpc import inference_pb2

RECOVERED_KEEP_S = 60.0
"""After a restart every request goes on for so long without a client at least: no client could help the loss."""


class SupersededError(Exception):
    """Another stream of the same answer was opened after this one."""


class Answer:
    """All of one answer so far. Fed by the driver; read by one stream at a time, from any index."""

    def __init__(self, accepted: Accepted, text: AnswerText, stop: "Callable[[Answer], None]") -> None:
        self.accepted = accepted
        self.verdict: commands.AcceptRequest | commands.RejectRequest | None = None
        self.is_left = False
        """Nobody waits for it any more."""
        self._text = text
        self._stop = stop
        self._tokens: list[inference_pb2.Token] = []
        self._finished: inference_pb2.Finished | None = None
        self._changed = asyncio.Event()
        self._reader = 0

    @property
    def id(self) -> RequestId:
        return self.accepted.spec.request_id

    @property
    def stopped(self) -> bool:
        """A stop string was seen."""
        return self._text.stopped

    @property
    def is_finished(self) -> bool:
        return self._finished is not None

    def take(self, event: ClientEvent) -> None:
        """A stop string ends the answer; what comes after it is dropped."""
        match event:
            case commands.AcceptRequest() | commands.RejectRequest():
                self.verdict = event
            case commands.EmitToken(token=token) if not self._text.stopped:
                self._tokens.append(token_to_proto(token, self._text.feed(token.token_id)))
                if self._text.stopped:
                    self._stop(self)
            case commands.FinishRequest(reason=reason, message=message, stats=stats):
                text = self._text.flush()
                stats = replace(stats, generated_tokens=len(self._tokens))
                self._finished = finished_to_proto("stop" if self._text.stopped else reason, message, stats, text)
            case commands.EmitToken():
                pass
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_for_verdict(self) -> commands.AcceptRequest | commands.RejectRequest:
        while self.verdict is None:
            await self._changed.wait()
        return self.verdict

    def open(self) -> int:
        """A new reader, and the only one from now on."""
        self._reader += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return self._reader

    def is_read_by(self, reader: int) -> bool:
        return self._reader == reader

    async def read(self, reader: int, from_index: int) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Every token from `from_index` on as it comes, then the end. Raises SupersededError."""
        index = from_index
        while True:
            if not self.is_read_by(reader):
                raise SupersededError
            changed = self._changed
            if index < len(self._tokens):
                yield inference_pb2.GenerateResponse(token=self._tokens[index])
                index += 1
            elif self._finished is not None:
                yield inference_pb2.GenerateResponse(finished=self._finished)
                return
            else:
                await changed.wait()


class Answers:
    """By request id: those under way, and for some minutes those that have ended."""

    def __init__(self, driver: Driver, make_text: Callable[[Accepted], AnswerText]) -> None:
        self._driver = driver
        self._make_text = make_text
        self._answers: dict[RequestId, Answer] = {}

    def get(self, request_id: RequestId) -> Answer | None:
        return self._answers.get(request_id)

    def begin(self, accepted: Accepted) -> Answer:
        """Hand a request in; its verdict may take a moment."""
        answer = self._new(accepted)
        self._driver.submit(accepted, lambda event: self._take(answer, event))
        return answer

    def recover(self, written: Iterable[Written]) -> None:
        """Go on with what the journal has; before anything else."""
        under_way = [(self._restored(request), request) for request in written]
        under_way = [(answer, request) for answer, request in under_way if not answer.is_finished]
        self._driver.recover(
            [self._as_recovered(request) for _, request in under_way],
            {answer.id: partial(self._take, answer) for answer, _ in under_way},
        )
        for answer, _ in under_way:
            if answer.stopped:
                self._end(answer, "stop")
            self.leave(answer, answer.open(), max(RECOVERED_KEEP_S, answer.accepted.keep_s))

    def leave(self, answer: Answer, reader: int, keep_s: float) -> None:
        """The reader is gone. Unless another one comes in time, the request is cancelled."""
        if answer.is_finished or not answer.is_read_by(reader):
            return
        if keep_s <= 0:
            answer.is_left = True
            self._end(answer, "cancelled")
        else:
            asyncio.get_running_loop().call_later(keep_s, self.leave, answer, reader, 0.0)

    def end_readers(self) -> None:
        """As if somebody else had opened a stream of every answer."""
        for answer in self._answers.values():
            answer.open()

    def _new(self, accepted: Accepted) -> Answer:
        return Answer(accepted, self._make_text(accepted), lambda answer: self._end(answer, "stop"))

    def _take(self, answer: Answer, event: ClientEvent) -> None:
        if isinstance(event, commands.AcceptRequest):
            self._answers[answer.id] = answer
        answer.take(event)
        if isinstance(event, commands.AcceptRequest) and answer.is_left:
            self._end(answer, "cancelled")
        if answer.is_finished:
            asyncio.get_running_loop().call_later(RESUMABLE_S, self._forget, answer)

    def _forget(self, answer: Answer) -> None:
        if self._answers.get(answer.id) is answer:
            del self._answers[answer.id]

    def _end(self, answer: Answer, reason: Literal["cancelled", "stop"]) -> None:
        """Without effect if it has ended: its id may belong to another one by now."""
        if self._answers.get(answer.id) is answer and not answer.is_finished:
            self._driver.post(RequestEnded(request_id=answer.id, reason=reason))

    def _restored(self, request: Written) -> Answer:
        answer = self._new(request.accepted)
        self._take(answer, commands.AcceptRequest(request_id=answer.id))
        for token in request.tokens:
            answer.take(commands.EmitToken(request_id=answer.id, token=token))
        if (ended := request.ended) is not None:
            self._take(
                answer,
                commands.FinishRequest(
                    request_id=answer.id, reason=ended.reason, message=ended.message, stats=ended.stats
                ),
            )
        return answer

    def _as_recovered(self, request: Written) -> RecoveredRequest:
        spec, deadline = request.accepted.spec, request.accepted.deadline
        if deadline is not None:
            spec = replace(spec, deadline_s=deadline.here())
        tokens = tuple(token.token_id for token in request.tokens)
        return RecoveredRequest(spec=spec, tokens=tokens, nodes=request.nodes)
