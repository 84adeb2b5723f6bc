"""Answers that are written on this node, or through it: first waiting for KV, then running, and stalled at worst."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgellm.runtime.batching.decode import Continuation
from edgellm.runtime.batching.steps import Segment
from edgellm.runtime.batching.transcript import Transcript
from edgellm.runtime.checks import RefusedError, check_known_tokens, check_request
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.types import Attempt, KvCopy, NodeId
from edgellm.runtime.lanes import Lanes
from edgellm.runtime.messages import Decode
from edgellm.runtime.stages.messages import StageSegment
from edgellm.runtime.stages.routes import Leg, Route, local_route, route_of

_NO_BLOCKS = np.empty(0, np.int32)


@dataclass(kw_only=True, eq=False)
class Answer:
    """One answer, as far as this node has to do with it."""

    decode: Decode
    route: Route
    legs: tuple[Leg, ...]
    """Those of this node."""
    kv_deadline_s: float
    state: Literal["waiting", "running", "stalled"] = "waiting"
    blocks: npt.NDArray[np.int32] = field(default_factory=lambda: _NO_BLOCKS)
    transcript: Transcript = field(init=False)
    """Kept up by the node that samples."""

    def __post_init__(self) -> None:
        decode = self.decode
        self.transcript = Transcript(decode.prompt, decode.generated, decode.generation)

    @property
    def begins_here(self) -> bool:
        return self.legs[0] is self.route[0]

    @property
    def needs_tokens(self) -> int:
        """Positions that must have KV here before it can go on."""
        return self.decode.resume_tokens if self.decode.resume_from else len(self.decode.prompt)

    def leg_at(self, stage: int) -> Leg | None:
        """This node's leg that begins with a stage of the pipeline."""
        return next((leg for leg in self.legs if leg.first_stage == stage), None)

    def leg_after(self, leg: Leg) -> Leg | None:
        """None after the last."""
        return next((other for other in self.route if other.first_stage > leg.first_stage), None)

    def segment(self, rows: StageSegment, leg: Leg, reach: int) -> Segment | None:
        """A later leg's rows; None if they do not go on where its KV (`reach`) or this node's tokens end."""
        is_sampled = rows.sample and leg is self.route[-1]
        if rows.first_position > reach or (is_sampled and rows.end != self.transcript.num_tokens):
            return None
        return Segment(
            attempt=rows.attempt,
            rows=rows.rows,
            tokens=None,
            first_position=rows.first_position,
            blocks=self.blocks,
            sample=self.transcript.next_sample() if is_sampled else None,
        )

    def continuation(self) -> Continuation:
        """What the first leg's batcher takes."""
        decode = self.decode
        known = len(decode.prompt) + len(decode.generated)
        return Continuation(
            attempt=decode.attempt,
            prompt=decode.prompt,
            generated=decode.generated,
            blocks=self.blocks,
            generation=decode.generation,
            computed=min(self.needs_tokens, known - 1),
        )


class Answers:
    """KV and the command to go on from it may come in either order."""

    def __init__(self, node_id: NodeId, ledger: BlockLedger, holdings: Holdings, lanes: Lanes) -> None:
        self._node_id = node_id
        self._ledger = ledger
        self._holdings = holdings
        self._lanes = lanes
        self._answers: dict[Attempt, Answer] = {}
        self._lost: set[Attempt] = set()
        """Whose KV will never be complete."""

    def __contains__(self, attempt: Attempt) -> bool:
        """Whether the command was given."""
        return attempt in self._answers

    @property
    def waiting_for_kv(self) -> int:
        return sum(answer.state == "waiting" for answer in self._answers.values())

    @property
    def running(self) -> int:
        return sum(answer.state == "running" for answer in self._answers.values())

    @property
    def with_logprobs(self) -> frozenset[Attempt]:
        return frozenset(attempt for attempt, answer in self._answers.items() if answer.decode.generation.logprobs)

    def get(self, attempt: Attempt) -> Answer | None:
        return self._answers.get(attempt)

    def reach(self, attempt: Attempt, leg: Leg) -> int:
        """The first position without KV in one of the leg's layers."""
        return self._holdings.reach(attempt, leg.layers)

    def is_waiting(self, attempt: Attempt) -> bool:
        return attempt in self._answers and self._answers[attempt].state == "waiting"

    def is_running(self, attempt: Attempt) -> bool:
        return attempt in self._answers and self._answers[attempt].state == "running"

    def add(self, decode: Decode, now_s: float) -> None:
        """It waits for KV. Raises RefusedError if it cannot be run here, or if its KV will never come."""
        answer, attempt = self._check(decode, now_s), decode.attempt
        self._answers[attempt] = answer
        if attempt in self._lost:
            raise RefusedError("transfer", "the sender has gone before the prompt's KV was complete")

    def start_ready(self, attempt: Attempt) -> Answer | None:
        """Start it if its KV is here and it has not started. Raises RefusedError if too little room was reserved."""
        answer = self._answers.get(attempt)
        if answer is None or answer.state != "waiting" or not self._has_kv(answer):
            return None
        self._start(answer)
        return answer

    def check_started(self, attempt: Attempt) -> None:
        """Raises RefusedError if a resumed answer lacks KV."""
        answer = self._answers[attempt]
        if answer.state == "waiting":
            raise RefusedError("transfer", f"fewer than {answer.needs_tokens} positions of its KV are here")

    def protect(self, attempt: Attempt, copies: Sequence[KvCopy]) -> None:
        """Keep these copies, in place of those of the same layers, once the waiting answer starts."""
        answer = self._answers[attempt]
        replaced = {copy.target.layers for copy in copies}
        others = (copy for copy in answer.decode.copies if copy.target.layers not in replaced)
        answer.decode = replace(answer.decode, copies=(*others, *copies))

    def kv_lost(self, attempt: Attempt) -> None:
        """Raises RefusedError if the answer was waiting for it; else the command, when it comes, is refused."""
        self._lost.add(attempt)
        if attempt in self._answers:
            raise RefusedError("transfer", "the sender has gone before the prompt's KV was complete")

    def late(self, now_s: float) -> list[Decode]:
        """Whose KV did not come in time."""
        answers = self._answers.values()
        return [one.decode for one in answers if one.state == "waiting" and one.kv_deadline_s <= now_s]

    def stall(self, attempt: Attempt) -> None:
        """Keep everything and do nothing. No effect if there is no such answer."""
        if answer := self._answers.get(attempt):
            answer.state = "stalled"
            self._lanes.remove(attempt)

    def drop(self, attempt: Attempt) -> None:
        self._answers.pop(attempt, None)
        self._lost.discard(attempt)

    def _check(self, decode: Decode, now_s: float) -> Answer:
        """Raises RefusedError for what this node has no engine for."""
        if not self._lanes.stages.stages:
            raise RefusedError("engine", "this node has no decode engine")
        route = self._route(decode)
        legs = tuple(leg for leg in route if leg.node_id == self._node_id)
        if not legs:
            raise RefusedError("engine", f"no stage of the pipeline is on node {self._node_id}")
        for leg in legs:
            engine = self._lanes.stages.of(leg.layers)
            if engine is None:
                raise RefusedError("engine", f"this node has no engine for layers {leg.layers}")
            check_request(engine.spec, decode)
        check_known_tokens(decode)
        return Answer(decode=decode, route=route, legs=legs, kv_deadline_s=now_s + decode.kv_timeout_s)

    def _route(self, decode: Decode) -> Route:
        if not decode.stages:
            return local_route(self._node_id, self._lanes.num_layers)
        try:
            return route_of(decode.stages, self._lanes.num_layers)
        except ValueError as error:
            raise RefusedError("engine", str(error)) from error

    def _has_kv(self, answer: Answer) -> bool:
        attempt, needed = answer.decode.attempt, answer.needs_tokens
        return all(self.reach(attempt, leg) >= needed for leg in answer.legs)

    def _start(self, answer: Answer) -> None:
        decode = answer.decode
        blocks = self._ledger.blocks(decode.attempt)
        needed = len(decode.prompt) + decode.generation.max_tokens
        if len(blocks) < self._ledger.pool.contract.blocks_for(needed):
            raise RefusedError("capacity", f"{len(blocks)} blocks were reserved for {needed} tokens")
        answer.blocks, answer.state = np.array(blocks, np.int32), "running"
        if answer.begins_here:
            self._lanes.writer(answer.route).batcher.add(answer.continuation())
