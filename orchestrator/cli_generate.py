"""edgellm generate and edgellm chat: one answer, or a conversation, streamed to the terminal."""

import argparse
import contextlib
import sys
from collections.abc import Sequence

import msgspec

from edgellm.orchestrator.arguments import integer_from
from edgellm.orchestrator.client import AnswerEvents, ClientError, connect, events, resumed_events
from edgellm.runtime.rpc import inference_pb2, inference_pb2_grpc

KEEP_MS = 30_000
"""For so long a request goes on after its stream was lost, while the client tries to take it up again."""
_PATHS = {
    inference_pb2.PREFILL_PATH_UNSPECIFIED: "none",
    inference_pb2.PREFILL_PATH_REMOTE: "remote, half precision",
    inference_pb2.PREFILL_PATH_LOCAL: "local, half precision",
    inference_pb2.PREFILL_PATH_DEGRADED: "degraded, by the decode engine",
}


class Answer(msgspec.Struct, kw_only=True):
    """One finished answer."""

    accepted: inference_pb2.Accepted
    text: str
    tokens: list[inference_pb2.Token]
    finished: inference_pb2.Finished


def add_generate_arguments(command: argparse.ArgumentParser) -> None:
    count = integer_from(0, 2**32 - 1)
    command.add_argument("--max-tokens", type=count, default=256, help="0: up to the end of the context (%(default)s)")
    command.add_argument("--temperature", type=float, help="0: greedy, the default")
    command.add_argument("--top-k", type=count, help="choose among so many of the likeliest tokens; 0: among all")
    command.add_argument("--top-p", type=float, help="among the likeliest that together have this probability")
    command.add_argument("--min-p", type=float, help="among those with this share of the likeliest one's probability")
    command.add_argument("--repetition-penalty", type=float)
    command.add_argument("--seed", type=integer_from(0, 2**64 - 1))
    command.add_argument("--stop", action="append", default=[], metavar="TEXT", help="may be given several times")
    command.add_argument("--ignore-eos", action="store_true")
    command.add_argument("--deadline-ms", type=count, default=0, help="give up after so long; 0: never (%(default)s)")
    command.add_argument(
        "--allow-degraded-prefill",
        action="store_true",
        help="let a decode engine read the prompt if no half-precision engine is left; changes the answer",
    )
    command.add_argument("--model", default="")
    command.add_argument("--stats", action="store_true", help="print times and how the KV travelled")


def generate(args: argparse.Namespace) -> int:
    with connect(args.server) as stub:
        answer = _collect(_asked(args, stub), show=not args.json)
    if args.json:
        print(msgspec.json.encode(_as_dict(answer)).decode())
    elif args.stats:
        print_stats(answer.finished)
    return _check(answer.finished)


def _asked(args: argparse.Namespace, stub: inference_pb2_grpc.InferenceStub) -> AnswerEvents:
    if args.resume is not None:
        return resumed_events(stub, _utf8(args.resume), args.from_index)
    prompt = _utf8(sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt)
    request = _request(args, [("user", prompt)])
    if args.raw:
        request.text = prompt
    return events(stub, request)


def chat(args: argparse.Namespace) -> int:
    messages: list[tuple[str, str]] = []
    with connect(args.server) as stub:
        while question := _ask():
            messages.append(("user", question))
            answer = _collect(events(stub, _request(args, messages)), show=True)
            messages.append(("assistant", answer.text))
            if args.stats:
                print_stats(answer.finished)
            _check(answer.finished)
    return 0


def _ask() -> str:
    try:
        return _utf8(input("> ").strip())
    except EOFError:
        return ""


def _request(args: argparse.Namespace, messages: Sequence[tuple[str, str]]) -> inference_pb2.GenerateRequest:
    chat = inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    )
    try:
        return inference_pb2.GenerateRequest(
            model=args.model,
            chat=chat,
            sampling=_sampling(args),
            max_tokens=args.max_tokens,
            stop=[_utf8(stop) for stop in args.stop],
            ignore_eos=args.ignore_eos,
            deadline_ms=args.deadline_ms,
            allow_degraded_prefill=args.allow_degraded_prefill,
            keep_ms=KEEP_MS,
        )
    except ValueError as error:
        raise ClientError(f"a number is out of range: {error}") from error


def _sampling(args: argparse.Namespace) -> inference_pb2.SamplingParams:
    return inference_pb2.SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def _utf8(text: str) -> str:
    """Raises ClientError for text that was not UTF-8 on the command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ClientError(f"the text is not valid UTF-8 at character {error.start}") from error
    return text


def _collect(answer: AnswerEvents, *, show: bool) -> Answer:
    accepted, tokens, pieces = inference_pb2.Accepted(), list[inference_pb2.Token](), list[str]()
    finished = inference_pb2.Finished()
    with contextlib.closing(answer):
        for event in answer:
            match event:
                case inference_pb2.Accepted():
                    accepted = event
                case inference_pb2.Token():
                    tokens.append(event)
                    pieces.append(event.text)
                case inference_pb2.Finished():
                    finished = event
                    pieces.append(event.text)
            if show and pieces:
                print(pieces[-1], end="", flush=True)
    if show:
        print()
    return Answer(accepted=accepted, text="".join(pieces), tokens=tokens, finished=finished)


def _check(finished: inference_pb2.Finished) -> int:
    """Raises ClientError for an answer that did not come to its end."""
    if finished.reason in (inference_pb2.FINISH_REASON_ERROR, inference_pb2.FINISH_REASON_DEADLINE):
        raise ClientError(f"the answer is incomplete: {finished.message}")
    if finished.reason == inference_pb2.FINISH_REASON_CANCELLED:
        raise ClientError("the answer is incomplete: it was cancelled")
    return 0


def _as_dict(answer: Answer) -> dict[str, object]:
    finished, timing, kv = answer.finished, answer.finished.timing, answer.finished.kv
    return {
        "request_id": answer.accepted.request_id,
        "seed": answer.accepted.seed,
        "text": answer.text,
        "token_ids": [token.token_id for token in answer.tokens],
        "reason": inference_pb2.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower(),
        "message": finished.message,
        "prompt_tokens": finished.prompt_tokens,
        "generated_tokens": finished.generated_tokens,
        "prefill_path": inference_pb2.PrefillPath.Name(finished.prefill_path).removeprefix("PREFILL_PATH_").lower(),
        "timing": {field.name: getattr(timing, field.name) for field in timing.DESCRIPTOR.fields},
        "kv": {field.name: getattr(kv, field.name) for field in kv.DESCRIPTOR.fields},
        "takeovers": finished.takeovers,
        "recovery": {
            field.name: getattr(finished.recovery, field.name) for field in finished.recovery.DESCRIPTOR.fields
        },
    }


def print_stats(finished: inference_pb2.Finished) -> None:
    """What it took, for people, on standard error."""
    timing, kv = finished.timing, finished.kv
    sent = "kept on the node, nothing sent"
    if kv.transport:
        sent = (
            f"{kv.transport}, {kv.codec}, {kv.chunks} chunks, {kv.bytes} bytes, "
            f"{kv.hidden_ms:.1f} ms hidden, {kv.exposed_ms:.1f} ms exposed"
        )
    lines = (
        f"tokens    {finished.prompt_tokens} prompt, {finished.generated_tokens} generated",
        f"TTFT      {timing.ttft_ms:.1f} ms (queue {timing.queue_ms:.1f}, prefill {timing.prefill_ms:.1f})",
        f"TPOT      {timing.tpot_ms:.1f} ms, total {timing.total_ms:.1f} ms",
        f"prefill   {_PATHS[finished.prefill_path]}",
        f"KV        {sent}",
        f"takeovers {finished.takeovers}{_recovery(finished)}",
    )
    print("\n".join(lines), file=sys.stderr)


def _recovery(finished: inference_pb2.Finished) -> str:
    if finished.takeovers == 0:
        return ""
    parts = finished.recovery
    return (
        f", {parts.total_ms:.0f} ms without a token: detect {parts.detect_ms:.0f}, fence {parts.fence_ms:.0f}, "
        f"restore {parts.restore_ms:.0f}, first token {parts.first_token_ms:.0f}"
    )
