"""One request to a cluster of processes, and what its client is told."""

from collections.abc import Callable
from dataclasses import dataclass, field

from edgellm.orchestrator.client import events
from edgellm.runtime.rpc import inference_pb2 as api
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

PROMPT = [1, *(3 + number % 200 for number in range(200))]
MAX_TOKENS = 200


@dataclass(kw_only=True)
class Answer:
    token_ids: list[int] = field(default_factory=list)
    finished: api.Finished | None = None

    def check(self, calm: list[int]) -> None:
        """It ended as it should, with the tokens of a run without faults."""
        assert self.finished is not None
        assert self.finished.reason == api.FINISH_REASON_LENGTH, self.finished.message
        assert self.token_ids == calm


def request(max_tokens: int = MAX_TOKENS) -> api.GenerateRequest:
    return api.GenerateRequest(
        token_ids=api.TokenIds(ids=PROMPT), max_tokens=max_tokens, ignore_eos=True, keep_ms=30_000
    )


def ask(stub: InferenceStub, at: Callable[[str | int], None] = lambda moment: None) -> Answer:
    """Ask and read to the end; `at` is told of the moments: "accepted", and how many tokens there are."""
    answer = Answer()
    for event in events(stub, request()):
        match event:
            case api.Accepted():
                at("accepted")
            case api.Token(index=index, token_id=token_id):
                assert index == len(answer.token_ids)
                answer.token_ids.append(token_id)
                at(len(answer.token_ids))
            case finished:
                answer.finished = finished
    return answer
