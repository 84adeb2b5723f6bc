"""Real processes are killed in the middle of answers; the client sees the tokens of a run without faults, each once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from edgellm.orchestrator.client import connect, events
from edgellm.orchestrator.local_cluster import LocalCluster, serve
from edgellm.orchestrator.process_cluster import free_port
from edgellm.runtime.rpc import inference_pb2 as api
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

REQUEST = api.GenerateRequest(text="Once upon a time", max_tokens=400, ignore_eos=True)


def node_pid(stub: InferenceStub, role: str) -> int:
    nodes = stub.GetCluster(api.GetClusterRequest(), timeout=10).nodes
    return next(node.pid for node in nodes if node.role == role and node.state == "ready")


def wait_for_nodes(stub: InferenceStub, count: int, timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while len(stub.GetCluster(api.GetClusterRequest(), timeout=10).nodes) < count:
        assert time.monotonic() < deadline_s, f"fewer than {count} nodes joined"
        time.sleep(0.05)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_node_changes_no_token(
    role: str, cluster: LocalCluster, ask: Callable, everything_is_free: Callable
) -> None:
    with cluster.client() as stub:
        expected = ask(stub, REQUEST).token_ids
        call = stub.Generate(REQUEST, timeout=120)
        tokens: list[api.Token] = []
        finished = api.Finished()
        for reply in call:
            if reply.WhichOneof("event") == "token":
                tokens.append(reply.token)
            elif reply.WhichOneof("event") == "finished":
                finished = reply.finished
            if len(tokens) == 5 and reply.WhichOneof("event") == "token":
                os.kill(node_pid(stub, role), signal.SIGKILL)
        assert finished.reason == api.FINISH_REASON_LENGTH, finished.message
        assert [token.index for token in tokens] == list(range(400))
        assert tuple(token.token_id for token in tokens) == expected
        assert finished.takeovers == (1 if role == "decode" else 0)
        assert ask(stub, REQUEST).token_ids == expected
        everything_is_free(stub)


def test_without_a_prefill_node_the_decode_node_reads_the_prompt_itself(
    stories_bundle: Path, cluster: LocalCluster, ask: Callable
) -> None:
    with cluster.client() as stub:
        expected = ask(stub, REQUEST).token_ids
    with serve(stories_bundle, options=["--no-local-nodes"]) as alone:
        command = [sys.executable, "-m", "edgellm.runtime.cli", "--orchestrator", alone.address]
        command += ["--bundle", str(stories_bundle), "--engine", "decode-pp0of1", "--node-id", "only"]
        with subprocess.Popen(command) as node, alone.client() as stub:
            wait_for_nodes(stub, 1)
            answer = ask(stub, REQUEST)
            node.terminate()
        assert answer.token_ids == expected
        assert answer.finished.prefill_path == api.PREFILL_PATH_LOCAL


def test_stopping_the_server_leaves_no_process(stories_bundle: Path, ask: Callable) -> None:
    with serve(stories_bundle) as cluster, cluster.client() as stub:
        ask(stub, api.GenerateRequest(text="The cat", max_tokens=4))
        processes = psutil.Process(cluster.process.pid).children(recursive=True)
        assert len(processes) >= 2
    assert not [process for process in processes if process.is_running()]


def test_a_killed_server_takes_its_nodes_with_it_and_goes_on_from_its_journal(
    stories_bundle: Path, tmp_path: Path, everything_is_free: Callable
) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = ["--listen", address, "--journal", str(tmp_path / "journal")]
    shared_memory = set(Path("/dev/shm").iterdir())
    with serve(stories_bundle, options=options) as cluster, connect(address) as stub, ThreadPoolExecutor(4) as threads:
        expected = followed(stub)
        answers = [threads.submit(followed, stub) for _ in range(4)]
        wait_for_decoding(stub, 4)
        nodes = psutil.Process(cluster.process.pid).children(recursive=True)
        cluster.process.kill()
        _, alive = psutil.wait_procs(nodes, timeout=30)
        assert not alive
        assert set(Path("/dev/shm").iterdir()) <= shared_memory
        with serve(stories_bundle, options=options):
            assert [answer.result() for answer in answers] == [expected] * 4
            everything_is_free(stub)


def followed(stub: InferenceStub) -> list[tuple[int, int]]:
    """Index and id of each token, over as many streams as it takes."""
    return [(event.index, event.token_id) for event in events(stub, REQUEST) if isinstance(event, api.Token)]


def wait_for_decoding(stub: InferenceStub, count: int, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while stub.GetCluster(api.GetClusterRequest(), timeout=10).decoding < count:
        assert time.monotonic() < deadline_s, f"never {count} answers at a time"
        time.sleep(0.005)
