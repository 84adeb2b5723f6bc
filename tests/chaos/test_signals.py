"""Every process is killed, stopped or ended at every moment of a request; the client sees the tokens of a calm run."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import psutil
import pytest

from edgellm.orchestrator.client import events
from edgellm.orchestrator.process_cluster import ORCHESTRATOR, ProcessCluster
from edgellm.runtime.rpc import inference_pb2 as api

PROMPT = [1, *(3 + number % 200 for number in range(200))]
MAX_TOKENS = 200
STOPPED_S = 1.5
"""A stopped process goes on after so long: it has been given up by then."""
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
VICTIMS = (ORCHESTRATOR, "reader", "first", "second", "spare")
MOMENTS = {
    "queued": ("before", 0.0),
    "mid-prefill": ("accepted", 0.01),
    "mid-transfer": ("accepted", 0.025),
    "just handed over": (1, 0.0),
    "during copying": (2, 0.0),
    "mid-decode": (40, 0.0),
    "during takeover": (60, 0.0),
}
"""When the signal comes: before the request, some time after it was accepted, or with so many tokens."""
DECODING = ("just handed over", "during copying", "mid-decode", "during takeover")
QUICK = {
    ("first", "mid-decode", signal.SIGKILL),
    ("second", "mid-decode", signal.SIGSTOP),
    ("second", "during takeover", signal.SIGKILL),
    ("reader", "mid-prefill", signal.SIGKILL),
    ("reader", "mid-transfer", signal.SIGSTOP),
    ("spare", "during copying", signal.SIGKILL),
    ("first", "just handed over", signal.SIGTERM),
    (ORCHESTRATOR, "mid-decode", signal.SIGKILL),
}
CASES = [
    pytest.param(*case, id=f"{case[0]}, {case[1]}, {case[2].name}", marks=[] if case in QUICK else [pytest.mark.slow])
    for case in product(VICTIMS, MOMENTS, SIGNALS)
]


@dataclass(kw_only=True)
class Answer:
    token_ids: list[int] = field(default_factory=list)
    finished: api.Finished | None = None


def ask(cluster: ProcessCluster, at: Callable[[str | int], None]) -> Answer:
    """Ask and read to the end; `at` is told of the moments."""
    request = api.GenerateRequest(
        token_ids=api.TokenIds(ids=PROMPT), max_tokens=MAX_TOKENS, ignore_eos=True, keep_ms=30_000
    )
    answer = Answer()
    with cluster.client() as stub:
        at("before")
        for event in events(stub, request):
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


@dataclass(kw_only=True)
class Hit:
    """Sends a signal at a moment, and undoes what it did to the orchestrator and to stopped processes."""

    cluster: ProcessCluster
    victim: str
    moment: str
    number: signal.Signals
    threads: list[threading.Thread] = field(default_factory=list)

    def at(self, now: str | int) -> None:
        when, delay_s = MOMENTS[self.moment]
        if self.moment == "during takeover" and now == when:
            self.cluster.signal("second" if self.victim == "first" else "first", signal.SIGKILL)
        if now == when:
            self.threads.append(threading.Thread(target=self._strike, args=(delay_s,)))
            self.threads[-1].start()

    def _strike(self, delay_s: float) -> None:
        time.sleep(delay_s)
        self.cluster.signal(self.victim, self.number)
        process = self.cluster.processes[self.victim]
        if self.number is signal.SIGSTOP:
            time.sleep(STOPPED_S)
            self.cluster.signal(self.victim, signal.SIGCONT)
        elif self.victim == ORCHESTRATOR:
            process.wait(20)
            self.cluster.start(ORCHESTRATOR)


@pytest.fixture(scope="module")
def calm(cluster: ProcessCluster) -> list[int]:
    """The tokens of a run without faults."""
    cluster.restore()
    return ask(cluster, lambda moment: None).token_ids


@pytest.fixture
def whole_cluster(cluster: ProcessCluster, calm: list[int]) -> Iterator[ProcessCluster]:
    """Ready before the test, and at rest after it."""
    cluster.restore()
    yield cluster
    cluster.restore()
    deadline_s = time.monotonic() + 15
    while (held := cluster.held()) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not held


@pytest.mark.parametrize(("victim", "moment", "number"), CASES)
def test_a_signal_changes_no_token(
    victim: str, moment: str, number: signal.Signals, whole_cluster: ProcessCluster, calm: list[int]
) -> None:
    hit = Hit(cluster=whole_cluster, victim=victim, moment=moment, number=number)
    answer = ask(whole_cluster, hit.at)
    for thread in hit.threads:
        thread.join()
    assert hit.threads
    assert answer.finished is not None
    assert answer.finished.reason == api.FINISH_REASON_LENGTH, answer.finished.message
    assert answer.token_ids == calm
    if victim in ("first", "second") and number is signal.SIGKILL and moment in DECODING:
        assert answer.finished.takeovers >= 1


def test_nothing_is_left_behind(staged_bundle: Path, tmp_path: Path) -> None:
    """No process, no shared memory, no file but logs and the journal."""
    shared_before = set(Path("/dev/shm").iterdir())
    nodes = {"reader": ("prefill-tp0of1",), "first": ("decode-pp0of2",), "second": ("decode-pp1of2",)}
    with ProcessCluster(staged_bundle, tmp_path, nodes) as cluster:
        cluster.restore()
        ask(cluster, Hit(cluster=cluster, victim="second", moment="mid-decode", number=signal.SIGKILL).at)
        cluster.restore()
        pids = [process.pid for process in cluster.processes.values()]
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert set(Path("/dev/shm").iterdir()) <= shared_before
    assert {path.suffix for path in tmp_path.iterdir()} <= {".log", ""}
