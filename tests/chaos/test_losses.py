"""Several processes go at once, or one is too slow; the client sees the tokens of a calm run."""

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from edgellm.orchestrator.process_cluster import ORCHESTRATOR, ProcessCluster
from edgellm.runtime.rpc import inference_pb2 as api
from tests.chaos.answers import Answer, ask

ALL = (ORCHESTRATOR, "reader", "first", "second", "spare")
WITHOUT_SPARE = ("a spare that went before", "spare")
LOSSES = {
    "a stage and its copy": ("first", "spare"),
    "both stages": ("first", "second"),
    "every decode node": ("first", "second", "spare"),
    "the prompt's reader and a stage": ("reader", "second"),
    "the orchestrator and a stage": (ORCHESTRATOR, "first"),
    "every node": ALL[1:],
    "every process": ALL,
}
"""Who is killed at the same moment. Nobody comes back by itself but the orchestrator, and nodes where none is left."""
QUICK = {"every decode node"}
AT = 40
STOP_S, RUN_S = 0.002, 0.0004
"""How long a throttled process stands still, and how long it runs in between: both are short against a heartbeat, and
with what signals take it gets less than a third."""
HISTORY_S = 4.0
"""What a node usually takes for a step is known after some seconds of work."""


def lost(cluster: ProcessCluster, victims: Sequence[str]) -> threading.Thread:
    """They are killed now; those without whom nobody could answer are started again by the thread."""

    def start_again() -> None:
        for name in victims:
            cluster.processes[name].wait(20)
            if name == ORCHESTRATOR or set(victims) >= set(cluster.nodes):
                cluster.start(name)

    for name in victims:
        cluster.signal(name, signal.SIGKILL)
    thread = threading.Thread(target=start_again)
    thread.start()
    return thread


def answer_with_loss(cluster: ProcessCluster, victims: Sequence[str]) -> Answer:
    threads = []
    with cluster.client() as stub:
        answer = ask(stub, lambda now: threads.append(lost(cluster, victims)) if now == AT else None)
    for thread in threads:
        thread.join()
    assert threads
    return answer


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "loss", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in LOSSES]
)
def test_losing_several_at_once_changes_no_token(loss: str, whole_cluster: ProcessCluster, calm: list[int]) -> None:
    answer = answer_with_loss(whole_cluster, LOSSES[loss])
    answer.check(calm)
    assert answer.finished is not None
    assert answer.finished.takeovers >= 1


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_without_a_spare_a_survivor_carries_both_stages(
    victim: str, whole_cluster: ProcessCluster, calm: list[int]
) -> None:
    whole_cluster.signal("spare", signal.SIGKILL)
    wait_for_state(whole_cluster, "spare", "dead")
    answer = answer_with_loss(whole_cluster, [victim])
    answer.check(calm)
    assert answer.finished is not None
    assert answer.finished.takeovers == 1
    assert answer.finished.recovery.restore_ms < answer.finished.recovery.total_ms


@pytest.mark.slow
def test_answers_that_share_a_stage_go_on_together(whole_cluster: ProcessCluster, calm: list[int]) -> None:
    killed = threading.Event()

    def at(now: str | int) -> None:
        if now == AT and not killed.is_set():
            killed.set()
            whole_cluster.signal("first", signal.SIGKILL)

    with whole_cluster.client() as stub, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: ask(stub, at), range(8)))
    for answer in answers:
        answer.check(calm)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_slow_stage_is_drained_and_comes_back(whole_cluster: ProcessCluster, calm: list[int]) -> None:
    """It is given up for no moment: its answers move by takeover, and it gets work again when it is well."""
    before = status_of(whole_cluster, "first").incarnation
    with whole_cluster.client() as stub, ThreadPoolExecutor(1) as thread:
        end = threading.Event()
        asking = thread.submit(lambda: [ask(stub) for _ in iter(end.is_set, True)])
        try:
            time.sleep(HISTORY_S)
            with throttled(whole_cluster, "first"):
                wait_for_state(whole_cluster, "first", "draining")
            wait_for_state(whole_cluster, "first", "ready")
        finally:
            end.set()
        answers = asking.result()
    for answer in answers:
        answer.check(calm)
    assert sum(answer.finished.takeovers for answer in answers if answer.finished is not None) >= 1
    assert status_of(whole_cluster, "first").incarnation == before


def test_a_process_that_is_about_to_end_is_started_again(whole_cluster: ProcessCluster) -> None:
    """It has a signal to end that it sees only when the cluster is restored, by which it goes on."""
    before = status_of(whole_cluster, "first").pid
    whole_cluster.signal("first", signal.SIGSTOP)
    whole_cluster.signal("first", signal.SIGTERM)
    wait_for_state(whole_cluster, "first", "dead")
    whole_cluster.restore()
    assert status_of(whole_cluster, "first").state == "ready"
    assert status_of(whole_cluster, "first").pid != before


@contextmanager
def throttled(cluster: ProcessCluster, name: str) -> Iterator[None]:
    """It stands still most of the time."""
    end = threading.Event()

    def stop_and_go() -> None:
        while not end.wait(RUN_S):
            cluster.signal(name, signal.SIGSTOP)
            time.sleep(STOP_S)
            cluster.signal(name, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def wait_for_state(cluster: ProcessCluster, node_id: str, state: str, timeout_s: float = 40.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (now := status_of(cluster, node_id).state) != state:
        assert time.monotonic() < deadline_s, f"{node_id} is {now}, not {state}"
        time.sleep(0.02)


def status_of(cluster: ProcessCluster, node_id: str) -> api.NodeStatus:
    status = cluster.status()
    assert status is not None
    return next(node for node in status.nodes if node.node_id == node_id)
