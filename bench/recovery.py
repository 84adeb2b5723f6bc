"""Clients that read while processes fail, and how long each of them waits for its next token."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import grpc

from edgellm.orchestrator.client import ClientError, events
from edgellm.orchestrator.process_cluster import ProcessCluster
from edgellm.runtime.rpc import inference_pb2 as api

BEFORE: Final = 16
"""Tokens that every client has when something fails."""
AFTER: Final = 24
"""Tokens that every client reads after that."""
_PATIENCE_S: Final = 900.0
_LOOK_S: Final = 0.005
_KEEP_MS: Final = 60_000


@dataclass(frozen=True, kw_only=True)
class Pause:
    """What a failure cost one client, in milliseconds; the parts are the orchestrator's account of it."""

    pause_ms: float
    detect_ms: float = 0.0
    fence_ms: float = 0.0
    restore_ms: float = 0.0
    first_token_ms: float = 0.0


class Reader(threading.Thread):
    """One client, which notes when each token comes."""

    def __init__(self, cluster: ProcessCluster, name: str, prompt: Sequence[int], max_tokens: int) -> None:
        super().__init__(name=name, daemon=True)
        self.prompt = prompt
        self.arrivals_s: list[float] = []
        self.token_ids: list[int] = []
        self.finished = api.Finished()
        self.error: Exception | None = None
        self._cluster = cluster
        self._request = api.GenerateRequest(
            request_id=name,
            token_ids=api.TokenIds(ids=prompt),
            max_tokens=max_tokens,
            ignore_eos=True,
            keep_ms=_KEEP_MS,
        )

    def run(self) -> None:
        try:
            with self._cluster.client() as stub:
                for event in events(stub, self._request):
                    match event:
                        case api.Token(token_id=token_id, index=index):
                            if index != len(self.token_ids):
                                raise ClientError(f"token {index} came where {len(self.token_ids)} was due")
                            self.token_ids.append(token_id)
                            self.arrivals_s.append(time.perf_counter())
                        case api.Finished():
                            self.finished = event
        except (ClientError, grpc.RpcError) as error:
            self.error = error

    def since(self, start_s: float) -> int:
        """Tokens that came after this."""
        return sum(arrival_s > start_s for arrival_s in self.arrivals_s)

    def pause(self, failed_s: float) -> Pause:
        """Up to the token that ended the longest wait since the failure."""
        after = [failed_s, *(arrival_s for arrival_s in self.arrivals_s if arrival_s > failed_s)]
        _, end_s = max(itertools.pairwise(after), key=lambda pair: pair[1] - pair[0])
        parts = self.finished.recovery
        return Pause(
            pause_ms=1e3 * (end_s - failed_s),
            detect_ms=parts.detect_ms,
            fence_ms=parts.fence_ms,
            restore_ms=parts.restore_ms,
            first_token_ms=parts.first_token_ms,
        )

    def cancel(self) -> None:
        """Take the request back; its stream ends with its account."""
        with self._cluster.client() as stub:
            stub.Cancel(api.CancelRequest(request_id=self.name), timeout=10)


def start_readers(
    cluster: ProcessCluster, name: str, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[Reader]:
    """One for each prompt; returns when all of them are in the middle of their answers."""
    readers = [Reader(cluster, f"{name}-{n}", prompt, max_tokens) for n, prompt in enumerate(prompts)]
    for reader in readers:
        reader.start()
    wait_until(readers, lambda reader: len(reader.token_ids) >= BEFORE)
    return readers


def end_readers(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.cancel()
    for reader in readers:
        reader.join(timeout=30)


def pauses_of(readers: Sequence[Reader], failed_s: float) -> list[Pause]:
    """Once every reader goes on."""
    wait_until(readers, lambda reader: reader.since(failed_s) >= AFTER)
    end_readers(readers)
    return [reader.pause(failed_s) for reader in readers]


def again(cluster: ProcessCluster, readers: Sequence[Reader], failed_s: float) -> tuple[list[Reader], list[Pause]]:
    """Every reader's client asks anew, and waits until it has one token more than it had."""
    had = [len(reader.token_ids) for reader in readers]
    max_tokens = max(had) + AFTER
    new = [Reader(cluster, f"{reader.name}-again", reader.prompt, max_tokens) for reader in readers]
    for before, reader in zip(readers, new, strict=True):
        before.cancel()
        reader.start()
    for count, reader in zip(had, new, strict=True):
        wait_until([reader], lambda reader, count=count: len(reader.token_ids) > count)  # type: ignore[misc]
    end_readers([*readers, *new])
    pauses = [
        Pause(pause_ms=1e3 * (reader.arrivals_s[count] - failed_s)) for count, reader in zip(had, new, strict=True)
    ]
    return new, pauses


def wait_until_finished(readers: Sequence[Reader]) -> None:
    """Raises ValueError like `wait_until`, and for an answer that ended otherwise than by its length."""
    wait_until(readers, lambda reader: reader.finished.reason != api.FINISH_REASON_UNSPECIFIED)
    for reader in readers:
        reader.join()
        if reader.finished.reason != api.FINISH_REASON_LENGTH:
            raise ValueError(f"{reader.name} ended otherwise than by its length: {reader.finished.message}")


def wait_until(readers: Sequence[Reader], holds: Callable[[Reader], bool]) -> None:
    """Raises ValueError for a client that failed, and after a long time."""
    deadline_s = time.monotonic() + _PATIENCE_S
    while not all(holds(reader) for reader in readers):
        broken = next((reader for reader in readers if reader.error is not None), None)
        if broken is not None or time.monotonic() > deadline_s:
            raise ValueError(f"{broken.name}: {broken.error}" if broken else f"not done after {_PATIENCE_S:.0f} s")
        time.sleep(_LOOK_S)
