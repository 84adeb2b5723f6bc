"""Checks what a client asks for and turns it into a RequestSpec. Every error says the value and what to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from edgellm.orchestrator.bundle import ModelInfo
from edgellm.orchestrator.core.values import Generation, RequestId, RequestSpec, Sampling
from edgellm.orchestrator.tokenizer import ModelTokenizer, PromptError
from edgellm.runtime.rpc import inference_pb2

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 128


class InvalidRequestError(ValueError):
    """The request is wrong as it stands."""

    def __init__(self, message: str, kind: Literal["invalid", "unknown_model"] = "invalid") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, kw_only=True)
class RequestReader:
    """Reads requests for one served model."""

    model: ModelInfo
    tokenizer: ModelTokenizer
    new_request_id: Callable[[], str]
    new_seed: Callable[[], int]

    def read(self, request: inference_pb2.GenerateRequest, now_s: float) -> RequestSpec:
        """Raises InvalidRequestError."""
        self._check_model(request.model)
        prompt = self._prompt(request)
        max_tokens = self._max_tokens(request.max_tokens, len(prompt))
        _check_stops(request)
        generation = Generation(
            max_tokens=max_tokens,
            sampling=self._sampling(request.sampling),
            stop_token_ids=self._stop_token_ids(request),
            logprobs=request.logprobs,
        )
        return RequestSpec(
            request_id=RequestId(_checked_id(request.request_id) or self.new_request_id()),
            prompt=prompt,
            generation=generation,
            deadline_s=now_s + request.deadline_ms / 1e3 if request.deadline_ms else None,
            allow_degraded_prefill=request.allow_degraded_prefill,
        )

    def _check_model(self, model: str) -> None:
        if model and model != self.model.id:
            raise InvalidRequestError(f"model {model!r} is not served here, {self.model.id!r} is", "unknown_model")

    def _prompt(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        try:
            prompt = self._tokens(request)
        except PromptError as error:
            raise InvalidRequestError(str(error)) from error
        if not prompt:
            raise InvalidRequestError("the prompt is empty: give text, chat messages or token ids")
        self._check_ids("prompt token id", prompt)
        return prompt

    def _tokens(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        match request.WhichOneof("prompt"):
            case "text":
                self._check_length(len(request.text))
                return tuple(self.tokenizer.encode_text(request.text)) if request.text else ()
            case "chat":
                return self._chat_tokens(request.chat)
            case "token_ids":
                return tuple(request.token_ids.ids)
            case _:
                return ()

    def _chat_tokens(self, chat: inference_pb2.Chat) -> tuple[int, ...]:
        messages = [(message.role, message.content) for message in chat.messages]
        if not any(content for _, content in messages):
            return ()
        self._check_length(sum(len(content) for _, content in messages))
        return tuple(self.tokenizer.encode_chat(messages))

    def _check_length(self, characters: int) -> None:
        """Before the work of tokenising what cannot fit, unless the tokenizer leaves most of it out."""
        longest = self.model.max_seq_len * self.tokenizer.longest_token
        if characters > longest:
            raise InvalidRequestError(
                f"the prompt has {characters} characters, and {longest} are the most that a context of "
                f"{self.model.max_seq_len} tokens can hold: shorten it"
            )

    def _check_ids(self, what: str, ids: tuple[int, ...]) -> None:
        outside = [token_id for token_id in ids if token_id >= self.model.vocab_size]
        if outside:
            raise InvalidRequestError(
                f"{what} {outside[0]} is outside the vocabulary: it must be below {self.model.vocab_size}"
            )

    def _max_tokens(self, asked: int, prompt_tokens: int) -> int:
        room = self.model.max_seq_len - prompt_tokens
        if room < 1:
            raise InvalidRequestError(
                f"the prompt has {prompt_tokens} tokens, and the context of {self.model.max_seq_len} tokens must hold "
                "it and at least one more: shorten it"
            )
        if asked > room:
            raise InvalidRequestError(
                f"{prompt_tokens} prompt tokens + max_tokens {asked} = {prompt_tokens + asked} exceed the context of "
                f"{self.model.max_seq_len} tokens: ask for at most {room}"
            )
        return asked or room

    def _stop_token_ids(self, request: inference_pb2.GenerateRequest) -> tuple[int, ...]:
        stops = tuple(request.stop_token_ids)
        self._check_ids("stop token id", stops)
        return stops if request.ignore_eos else tuple(dict.fromkeys(stops + self.model.eos_token_ids))

    def _sampling(self, params: inference_pb2.SamplingParams) -> Sampling:
        biased = tuple(sorted(params.logit_bias.items()))
        self._check_ids("logit_bias token id", tuple(token_id for token_id, _ in biased))
        for token_id, bias in biased:
            _require(-1000 <= bias <= 1000, f"logit_bias of token {token_id}", bias, "from -1000 to 1000")
        return Sampling(
            temperature=_temperature(params),
            top_k=params.top_k,
            top_p=_top_p(params),
            min_p=_min_p(params),
            repetition_penalty=_repetition_penalty(params),
            logit_bias=biased,
            seed=params.seed if params.HasField("seed") else self.new_seed(),
        )


def _temperature(params: inference_pb2.SamplingParams) -> float:
    value = params.temperature
    _require(value == 0 or 1e-3 <= value <= 100, "temperature", value, "0 (greedy), or from 0.001 to 100")
    return value


def _top_p(params: inference_pb2.SamplingParams) -> float:
    value = params.top_p if params.HasField("top_p") else 1.0
    _require(0 < value <= 1, "top_p", value, "above 0 and at most 1")
    return value


def _min_p(params: inference_pb2.SamplingParams) -> float:
    _require(0 <= params.min_p <= 1, "min_p", params.min_p, "from 0 (off) to 1")
    return params.min_p


def _repetition_penalty(params: inference_pb2.SamplingParams) -> float:
    value = params.repetition_penalty if params.HasField("repetition_penalty") else 1.0
    _require(0.01 <= value <= 100, "repetition_penalty", value, "from 0.01 to 100 (1 is off)")
    return value


def _require(holds: bool, name: str, value: float, must_be: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{name} is {value:g}: it must be {must_be}")


def _check_stops(request: inference_pb2.GenerateRequest) -> None:
    if len(request.stop) > MAX_STOP_STRINGS:
        raise InvalidRequestError(
            f"{len(request.stop)} stop strings were given: at most {MAX_STOP_STRINGS} are allowed"
        )
    if "" in request.stop:
        raise InvalidRequestError("a stop string is empty: leave it out")
    longest = max(map(len, request.stop), default=0)
    if longest > MAX_STOP_LENGTH:
        raise InvalidRequestError(f"a stop string has {longest} characters: at most {MAX_STOP_LENGTH} are allowed")


def _checked_id(request_id: str) -> str:
    if len(request_id) > MAX_REQUEST_ID_LENGTH or not request_id.isprintable():
        raise InvalidRequestError(
            f"request id {request_id[:40]!r} must be printable and at most {MAX_REQUEST_ID_LENGTH} characters long"
        )
    return request_id
