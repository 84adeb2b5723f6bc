"""How a driver talks to the benchmark: one JSON object a line, requests on stdin, replies on what stdout was.

A driver runs in its peer's own environment, so this file needs nothing but Python's standard library.

    {"do": "load", "model": PATH, "phases": ["decode"], "threads": 2, "max_batch": 32, "kv_tokens": 8192,
     "vocab_size": 32000, "real_time": true}
                                          -> {"load_s": 1.2, "scheduler": "SCHED_RR 5"}   phases: what will be asked
    {"do": "prefill", "tokens": 512}      -> {"seconds": 2.1}   an empty cache before, the likeliest next token after
    {"do": "decode", "batch": 8, "context": 128, "steps": 16}
                                          -> {"seconds": 0.9}   of all steps; each takes the likeliest token
"""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

REAL_TIME_PRIORITY = 5


class Runner(Protocol):
    """A loaded model. What is not to be measured (filling the context) is done before the seconds start."""

    def prefill(self, tokens: int) -> float:
        """Seconds."""
        ...

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of all steps."""
        ...


def serve(load: Callable[[dict[str, Any]], Runner]) -> None:
    """Answer requests until stdin ends. A failed one is answered with {"error": ...}."""
    replies = _take_stdout()
    runners: list[Runner] = []
    for line in sys.stdin:
        try:
            reply = _answer(load, runners, json.loads(line))
        except Exception as error:  # noqa: BLE001 - a peer's errors have any type; the benchmark reports them
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def seconds_of(action: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def random_tokens(count: int, vocab_size: int) -> list[int]:
    """Token ids past the special ones; others at every call, so that no cache of prompts knows them."""
    return [random.randrange(300, vocab_size) for _ in range(count)]


def _answer(load: Callable[[dict[str, Any]], Runner], runners: list[Runner], request: dict[str, Any]) -> dict[str, Any]:
    match request.pop("do"):
        case "load":
            scheduler = _real_time() if request.pop("real_time") else "SCHED_OTHER"
            load_s = seconds_of(lambda: runners.append(load(request)))
            return {"load_s": load_s, "scheduler": scheduler}
        case "prefill":
            return {"seconds": runners[0].prefill(**request)}
        case "decode":
            return {"seconds": runners[0].decode(**request)}
        case other:
            raise ValueError(f"request {other!r} is not known")


def _real_time() -> str:
    """Ask for a real-time scheduler, for this process and the threads it will start; what came of it."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY))
    except PermissionError:
        return "SCHED_OTHER (SCHED_RR is not permitted here)"
    return f"SCHED_RR {REAL_TIME_PRIORITY}"


def _take_stdout() -> TextIO:
    """Keep stdout for replies; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
