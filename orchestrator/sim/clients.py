"""The clients of a simulated cluster: submit, cancel, and check every token they are given."""

from dataclasses import dataclass, field
from typing import Literal

from edgellm.orchestrator.core.commands import AcceptRequest, EmitToken, FinishRequest, RejectRequest, RequestCommand
from edgellm.orchestrator.core.values import FinishReason, RequestId, RequestSpec, RequestStats
from edgellm.orchestrator.sim.node import SimulationError
from edgellm.orchestrator.sim.toy import expected_answer

LATE_S = 0.1
"""A deadline is enforced within this time."""


@dataclass(kw_only=True)
class ClientRequest:
    """What one client asked for and has seen."""

    spec: RequestSpec
    expected: list[int]
    state: Literal["sent", "accepted", "rejected", "finished"] = "sent"
    tokens: list[int] = field(default_factory=list)
    cancelled: bool = False
    reason: FinishReason | None = None
    stats: RequestStats | None = None


class Clients:
    """Raises SimulationError as soon as an answer is wrong."""

    def __init__(self) -> None:
        self.requests: dict[RequestId, ClientRequest] = {}

    def submit(self, spec: RequestSpec) -> None:
        self.requests[spec.request_id] = ClientRequest(spec=spec, expected=expected_answer(spec))

    def take(self, now_s: float, command: RequestCommand) -> None:
        request = self.requests[command.request_id]
        match command:
            case AcceptRequest():
                _require(request.state == "sent", f"{command.request_id} was accepted in state {request.state}")
                request.state = "accepted"
            case RejectRequest():
                _require(request.state == "sent", f"{command.request_id} was rejected in state {request.state}")
                request.state = "rejected"
            case EmitToken():
                _take_token(now_s, request, command)
            case FinishRequest():
                _take_end(now_s, request, command)

    def open_requests(self) -> list[RequestId]:
        return [i for i, request in self.requests.items() if request.state in ("sent", "accepted")]

    def finished(self) -> list[ClientRequest]:
        return [request for request in self.requests.values() if request.state == "finished"]


def _take_token(now_s: float, request: ClientRequest, command: EmitToken) -> None:
    name, index, deadline_s = command.request_id, len(request.tokens), request.spec.deadline_s
    _require(deadline_s is None or now_s < deadline_s + LATE_S, f"{name} got token {index} after its deadline")
    _require(request.state == "accepted", f"{name} got a token in state {request.state}")
    _require(command.token.index == index, f"{name} got token {command.token.index} where {index} was due")
    _require(index < len(request.expected), f"{name} got more than its {len(request.expected)} tokens")
    expected = request.expected[index]
    _require(
        command.token.token_id == expected, f"{name} got {command.token.token_id} as token {index}, not {expected}"
    )
    request.tokens.append(command.token.token_id)


def _take_end(now_s: float, request: ClientRequest, command: FinishRequest) -> None:
    name = command.request_id
    _require(request.state == "accepted", f"{name} ended in state {request.state}")
    request.state, request.reason, request.stats = "finished", command.reason, command.stats
    match command.reason:
        case "stop" | "length":
            _require(request.tokens == request.expected, f"{name} ended after {len(request.tokens)} tokens")
        case "cancelled":
            _require(request.cancelled, f"{name} was cancelled, but not by its client")
        case "deadline":
            deadline_s = request.spec.deadline_s
            _require(deadline_s is not None and now_s >= deadline_s, f"{name} missed a deadline it did not have")
        case "error":
            raise SimulationError(f"{name} failed: {command.message}")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SimulationError(otherwise)
