"""The commands as people type them: edgellm, edgellm-serve, edgellm-sim."""

import asyncio
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from edgellm.orchestrator import cli, client, serve
from edgellm.orchestrator.background import beside
from edgellm.orchestrator.bundle import BundleError, Placement, Plan, open_bundle
from edgellm.orchestrator.client import connect
from edgellm.orchestrator.local_nodes import (
    LONGEST_BACKOFF_S,
    STEADY_S,
    LocalNode,
    NodeLauncher,
    NodeStartError,
    _next_backoff_s,
    planned_nodes,
)
from edgellm.orchestrator.sim import cli as sim_cli
from edgellm.runtime.rpc.inference_pb2 import GetClusterRequest


@pytest.fixture(scope="module")
def address(live_cluster) -> Iterator[str]:
    """A live cluster in a thread of its own, because the command line blocks."""
    ready, stop = threading.Event(), threading.Event()
    found: list[str] = []

    async def scenario():
        async with live_cluster() as cluster:
            found.append(cluster.orchestrator.address)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(scenario(),))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    stop.set()
    thread.join()


def test_generate_prints_text_and_stats(address, capsys):
    code = cli.main(
        ["generate", "--server", address, "--prompt", "hello", "--max-tokens", "8", "--seed", "1", "--stats"]
    )
    printed = capsys.readouterr()
    assert code == 0
    assert printed.out.endswith("\n")
    assert "takeovers 0" in printed.err
    assert "22 prompt, 8 generated" in printed.err


def test_generate_as_json_is_one_object_and_repeatable(address, capsys):
    arguments = [
        "generate",
        "--server",
        address,
        "--prompt",
        "hello",
        "--raw",
        "--max-tokens",
        "8",
        "--seed",
        "1",
        "--json",
    ]
    answers = []
    for _ in range(2):
        assert cli.main(arguments) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["prompt_tokens"] == 5
    assert answers[0]["prefill_path"] == "remote"
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_chat_keeps_the_conversation(address, capsys, monkeypatch):
    questions = iter(["hi", "and?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(questions))
    assert cli.main(["chat", "--server", address, "--max-tokens", "4", "--ignore-eos", "--stats"]) == 0
    prompts = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokens")]
    assert len(prompts) == 2
    first, second = (int(line.split()[1]) for line in prompts)
    assert second > first


def test_a_prompt_from_standard_input_ends_before_its_last_newline(address, capsys, monkeypatch):
    counts = []
    for text in ("hello", "hello\n", "hello\n\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert cli.main(["generate", "--server", address, "--prompt", "-", "--raw", "--max-tokens", "1", "--json"]) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    assert counts[0] == counts[1] < counts[2]


@pytest.mark.parametrize("after_s", [0.0, 0.013, 0.05, 0.11])
def test_ctrl_c_cancels_without_a_traceback(address, after_s):
    # Whoever runs the tests in the background may ignore the signal, and children inherit that.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "edgellm.orchestrator.cli"]
    command += ["generate", "--server", address, "--raw", "--prompt", "hello", "--ignore-eos", "--max-tokens", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        time.sleep(after_s)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors.strip()) == (130, b"")
    with connect(address) as stub:
        deadline_s = time.monotonic() + 10
        while stub.GetCluster(GetClusterRequest()).decoding and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert stub.GetCluster(GetClusterRequest()).decoding == 0


def test_status_shows_every_node(address, capsys):
    assert cli.main(["status", "--server", address]) == 0
    printed = capsys.readouterr().out
    assert "p0 #1" in printed
    assert "d0 #1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--temperature", "-1"], "temperature is -1"),
        (["--prompt", "x", "--top-p", "nan"], "top_p is nan"),
        (["--prompt", "", "--raw"], "the prompt is empty"),
        (["--prompt", "a\udcffb"], "not valid UTF-8 at character 1"),
        (["--prompt", "x", "--model", "other"], "'other' is not served here"),
    ],
)
def test_mistakes_are_one_line(address, capsys, arguments, message):
    assert cli.main(["generate", "--server", address, *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_server_that_refuses_connections_is_not_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 3600.0)
    assert cli.main(["status", "--server", f"127.0.0.1:{_free_port()}"]) == 1
    assert "is edgellm-serve running?" in capsys.readouterr().err


def test_a_server_that_accepts_and_never_answers_is_given_up(capsys, monkeypatch):
    monkeypatch.setattr(client, "CONNECT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert cli.main(["status", "--server", f"127.0.0.1:{silent.getsockname()[1]}"]) == 1
    assert "is edgellm-serve running?" in capsys.readouterr().err


def test_a_server_that_is_just_starting_is_waited_for(monkeypatch):
    monkeypatch.setattr(client, "REFUSED_TIMEOUT_S", 60.0)
    address, connected = f"127.0.0.1:{_free_port()}", threading.Event()

    def connect_first():
        with connect(address):
            connected.set()

    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(connect_first)
        assert not connected.wait(0.3)
        server = grpc.server(threads)
        server.add_insecure_port(address)
        server.start()
        waiting.result(timeout=60)
        server.stop(None).wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_serve_without_a_bundle_says_what_to_do(tmp_path, capsys):
    assert serve.main(["--bundle", str(tmp_path)]) == 1
    assert "--bundle takes a folder made by edgellm-build" in capsys.readouterr().err


def test_serve_on_a_port_in_use(bundle, capsys):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        listen = ["--listen", f"127.0.0.1:{port}", "--journal", "off"]
        assert serve.main(["--bundle", str(bundle.folder), *listen]) == 1
    assert "is the port in use?" in capsys.readouterr().err


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999"])
def test_serve_on_an_impossible_address(bundle, capsys, listen):
    assert serve.main(["--bundle", str(bundle.folder), "--listen", listen, "--journal", "off"]) == 1
    assert listen in capsys.readouterr().err


def test_broken_bundles_are_refused(bundle, tmp_path):
    text = (bundle.folder / "bundle.json").read_text()
    broken = {
        "schema 7": text.replace('"schema_version":1', '"schema_version":7'),
        "is broken": text[: len(text) // 2],
        "missing required field": text.replace('"vocab_size"', '"vocabulary"'),
    }
    for message, content in broken.items():
        (tmp_path / "bundle.json").write_text(content)
        with pytest.raises(BundleError, match=message):
            open_bundle(tmp_path)


def test_a_node_that_ran_for_long_starts_again_at_once_and_any_other_after_growing_pauses():
    pauses_s = [0.0]
    for _ in range(12):
        pauses_s.append(_next_backoff_s(pauses_s[-1], ran_s=1.0))
    assert pauses_s[1] > 0
    assert pauses_s == sorted(pauses_s)
    assert pauses_s[-1] == LONGEST_BACKOFF_S
    assert _next_backoff_s(LONGEST_BACKOFF_S, ran_s=STEADY_S) == 0.0


def test_planned_nodes_are_named_after_their_devices():
    placements = [("nx", "prefill-0"), ("nano", "decode-0"), ("nano", "decode-1")]
    plan = Plan(
        placements=tuple(
            Placement(engine=engine, device=device, device_class="cpu-local", role="decode", num_layers=4)
            for device, engine in placements
        )
    )
    assert [(node.node_id, node.engine, node.spare) for node in planned_nodes(plan, spares=1)] == [
        ("nx", "prefill-0", False),
        ("nano.decode-0", "decode-0", False),
        ("nano.decode-1", "decode-1", False),
        ("spare0", "prefill-0", True),
    ]


def test_ranks_of_an_engine_start_together():
    engines = [f"prefill-tp{rank}of2" for rank in (0, 1, 0, 1)]
    plan = Plan(
        placements=tuple(
            Placement(engine=engine, device=f"nx{number}", device_class="cpu-local", role="prefill", num_layers=4)
            for number, engine in enumerate([*engines, "prefill-tp0of1"])
        )
    )
    assert [(node.node_id, [one.node_id for one in node.followers]) for node in planned_nodes(plan)] == [
        ("nx0", ["nx1"]),
        ("nx2", ["nx3"]),
        ("nx4", []),
    ]


def planned_bundle(bundle, folder, *num_layers: int):
    """A bundle whose plan has one decode engine for each count of layers, none of which is there."""
    shutil.copytree(bundle.folder, folder)
    placements = [
        {
            "engine": f"decode-{i}",
            "device": f"d{i}",
            "device_class": "cpu-local",
            "role": "decode",
            "first_layer": sum(num_layers[:i]),
            "num_layers": layers,
        }
        for i, layers in enumerate(num_layers)
    ]
    index = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps(index | {"plan": {"placements": placements}}))
    return folder


def test_stages_that_do_not_cut_the_model_are_refused(bundle, tmp_path, capsys):
    gap = planned_bundle(bundle, tmp_path / "gap", 2, 1)
    assert serve.main(["--bundle", str(gap), "--listen", "127.0.0.1:0"]) == 1
    error = capsys.readouterr().err
    assert "the stages ['0-1', '2-2'] do not cut 4 layers" in error
    assert error.count("\n") == 1


def test_a_bundle_that_nodes_cannot_run_ends_the_server_at_once_with_one_line(bundle, tmp_path, capfd):
    broken = planned_bundle(bundle, tmp_path / "broken", 2, 2)
    assert serve.main(["--bundle", str(broken), "--listen", "127.0.0.1:0"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert re.match(r"edgellm-serve: node d[01]: bundle .* has no engine 'decode-[01]'", line)


def test_a_node_that_never_comes_up_is_given_up_after_three_starts(tmp_path):
    wrong = NodeLauncher(
        orchestrator="127.0.0.1:1", bundle=tmp_path, options=("--threads", "0"), has_joined=lambda _: False
    )
    with pytest.raises(NodeStartError, match=r"node d0 ended 3 times before it joined \(exit status 2\)"):
        asyncio.run(wrong.keep_running(LocalNode(node_id="d0", engine="decode-0")))


def test_nodes_that_are_given_up_at_the_same_moment_are_one_error():
    async def given_up(name):
        raise NodeStartError(name)

    async def run():
        async with beside(given_up("a"), given_up("b")):
            await asyncio.sleep(10)

    with pytest.raises(NodeStartError, match="a"):
        asyncio.run(run())


def test_sim_runs_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0.0, "prompt_tokens": 64, "max_tokens": 4}\n' * 3)
    assert sim_cli.main(["run", "--trace", str(trace), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["failed"]) == (3, 0)
    assert 0 < report["ttft_ms"]["p50"] <= report["ttft_ms"]["p99"]


def test_sim_says_which_line_of_a_trace_is_wrong(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0.0, "prompt_tokens": 64, "max_tokens": 4}\n{}\n')
    assert sim_cli.main(["run", "--trace", str(trace)]) == 1
    assert "line 2" in capsys.readouterr().err


def test_sim_fuzz_says_what_it_did(capsys):
    assert sim_cli.main(["fuzz", "--seeds", "2", "--first-seed", "7"]) == 0
    assert "2 seeds from 7: every invariant held" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["generate", "--prompt", "x", "--max-tokens", "-1"], "--max-tokens: -1 is outside of 0 to"),
        (["generate", "--prompt", "x", "--seed", "-1"], "--seed: -1 is outside of 0 to"),
        (["generate", "--prompt", "x", "--top-k", "many"], "--top-k: 'many' is not a whole number"),
    ],
)
def test_numbers_without_sense_are_refused_by_name(command, message, capsys):
    with pytest.raises(SystemExit) as exit_status:
        cli.main(command)
    assert exit_status.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["run", "--rate", "0"], ["run", "--rate", "nan"], ["run", "--count", "0"], ["fuzz", "--seeds", "-1"]]
)
def test_a_simulation_of_nothing_is_refused(command, capsys):
    with pytest.raises(SystemExit) as exit_status:
        sim_cli.main(command)
    assert exit_status.value.code == 2
    assert command[1] in capsys.readouterr().err


def test_a_reader_that_leaves_early_sees_no_traceback(address):
    command = [sys.executable, "-m", "edgellm.orchestrator.cli", "generate", "--server", address, "--raw"]
    command += ["--prompt", "hello", "--ignore-eos", "--max-tokens", "200"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=20) == 1
        assert process.stderr.read() == b""
