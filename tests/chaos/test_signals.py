"""Every process is killed, stopped or ended at every moment of a request; the client sees the tokens of a calm run."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

import pytest

from edgellm.orchestrator.process_cluster import ORCHESTRATOR, ProcessCluster
from tests.chaos.answers import ask, request
from tests.chaos.links import Links

STOPPED_S = 1.0
"""A stopped process goes on after so long: it has been given up by then."""
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
VICTIMS = (ORCHESTRATOR, "reader", "first", "second", "spare")
MOMENTS = {
    "queued": "accepted",
    "mid-prefill": "accepted",
    "mid-transfer": 1,
    "just handed over": 2,
    "during copying": 3,
    "mid-decode": 40,
    "during takeover": 60,
}
"""When the signal comes, by what the client has heard. The first three last until then: see `kept_at`."""
DECODING = ("just handed over", "during copying", "mid-decode", "during takeover")
CROWDING_TOKENS = 300
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
class Hit:
    """Sends a signal at a moment, and undoes what it did to the orchestrator and to stopped processes."""

    cluster: ProcessCluster
    victim: str
    moment: str
    number: signal.Signals
    let_go: Callable[[], None]
    """Called after the signal: the moment may pass."""
    threads: list[threading.Thread] = field(default_factory=list)

    def at(self, now: str | int) -> None:
        if now != MOMENTS[self.moment]:
            return
        if self.moment == "during takeover":
            self.cluster.signal("second" if self.victim == "first" else "first", signal.SIGKILL)
        self.cluster.signal(self.victim, self.number)
        self.let_go()
        self.threads.append(threading.Thread(target=self._undo))
        self.threads[-1].start()

    def _undo(self) -> None:
        process = self.cluster.processes[self.victim]
        if self.number is signal.SIGSTOP:
            time.sleep(STOPPED_S)
            self.cluster.signal(self.victim, signal.SIGCONT)
        elif self.victim == ORCHESTRATOR:
            process.wait(20)
            self.cluster.start(ORCHESTRATOR)


@contextmanager
def kept_at(moment: str, cluster: ProcessCluster, links: Links) -> Iterator[Callable[[], None]]:
    """A request that is made inside does not pass this moment before the yielded function is called."""
    match moment:
        case "queued":
            with crowd(cluster) as leave:
                yield leave
        case "mid-prefill":
            links.joins["reader"].block("up")
            yield links.heal
        case "mid-transfer":
            links.exchanges["first"].block("up")
            yield links.heal
        case _:
            yield lambda: None


@contextmanager
def crowd(cluster: ProcessCluster) -> Iterator[Callable[[], None]]:
    """Two answers leave no room for a third, until the yielded function is called."""
    with cluster.client() as stub:
        calls = [stub.Generate(request(CROWDING_TOKENS)) for _ in range(2)]
        for call in calls:
            next(reply for reply in call if reply.WhichOneof("event") == "token")
        yield lambda: [call.cancel() for call in calls]


@pytest.mark.parametrize(("victim", "moment", "number"), CASES)
def test_a_signal_changes_no_token(
    victim: str, moment: str, number: signal.Signals, whole_cluster: ProcessCluster, links: Links, calm: list[int]
) -> None:
    with kept_at(moment, whole_cluster, links) as let_go, whole_cluster.client() as stub:
        hit = Hit(cluster=whole_cluster, victim=victim, moment=moment, number=number, let_go=let_go)
        answer = ask(stub, hit.at)
    for thread in hit.threads:
        thread.join()
    assert hit.threads
    answer.check(calm)
    if victim in ("first", "second") and number is signal.SIGKILL and moment in DECODING:
        assert answer.finished is not None
        assert answer.finished.takeovers >= 1


@pytest.mark.parametrize(("moment", "state"), [("queued", "queued"), ("mid-prefill", "prefilling")])
def test_a_request_is_kept_where_the_signals_are_to_hit_it(
    moment: str, state: str, whole_cluster: ProcessCluster, links: Links, calm: list[int]
) -> None:
    counts = []

    def look(now: str | int) -> None:
        if now == "accepted":
            status = whole_cluster.status()
            counts.append(getattr(status, state))
            let_go()

    with kept_at(moment, whole_cluster, links) as let_go, whole_cluster.client() as stub:
        ask(stub, look).check(calm)
    assert counts == [1]
