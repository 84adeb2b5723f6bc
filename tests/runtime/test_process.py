"""edgellm-node as a process: what it prints when it cannot start, and how it ends."""

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from edgellm.engines.load import load_engine
from edgellm.runtime.rpc import cluster_pb2
from tests.runtime.conftest import (
    Joined,
    attempt,
    decode,
    eventually,
    generation,
    greedy_answer,
    orchestrating,
    prefill,
    random_prompt,
)

NODE = [sys.executable, "-m", "edgellm.runtime.cli", "--node-id", "n"]


def start(bundle: Path, *options: str, engine: str = "decode-pp0of1", orchestrator: str = "127.0.0.1:1") -> list[str]:
    return [
        *NODE, "--orchestrator", orchestrator, "--bundle", str(bundle), "--engine", engine, "--kv-blocks", "32",
        "--threads", "1", "--join-timeout", "0.2", *options,
    ]  # fmt: skip


def refusal(command: list[str]) -> str:
    """The one line that a node prints when it cannot start."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("edgellm-node: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@asynccontextmanager
async def process(orchestrator, bundle: Path, node_id: str, engine: str, *options: str):
    command = start(bundle, "--node-id", node_id, *options, engine=engine, orchestrator=orchestrator.address)
    child = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    try:
        yield child, await orchestrator.node(node_id)
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


def kv_target(joined: Joined) -> cluster_pb2.KvTarget:
    hello = joined.hello
    return cluster_pb2.KvTarget(
        node_id=hello.node_id, address=hello.exchange_address, host_id=hello.host_id, first_layer=0, num_layers=3
    )


def test_two_processes_answer_like_one_engine_and_stop_cleanly(tiny_bundle):
    engine = load_engine(tiny_bundle, "decode-pp0of1", kv_blocks=32, threads=1)
    prompt = random_prompt(150)
    expected = greedy_answer_in_chunks(engine, prompt, 20)
    engine.close()

    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reading, reader = await stack.enter_async_context(
                process(orchestrator, tiny_bundle, "reader", "prefill-tp0of1")
            )
            writing, writer = await stack.enter_async_context(
                process(orchestrator, tiny_bundle, "writer", "decode-pp0of1")
            )
            assert (reader.hello.role, writer.hello.role) == ("prefill", "decode")
            assert [engine.name for engine in writer.hello.engines] == ["prefill-tp0of1", "decode-pp0of1"]
            wish = generation(20)
            reader.send(prefill=prefill("r", prompt, wish, targets=[kv_target(writer)]))
            [done] = await reader.wait_for("PrefillDone", "r")
            writer.send(decode=decode("r", prompt, wish, [done.first_token.token_id]))
            rest = await writer.wait_for("AttemptToken", "r", 19)
            assert [done.first_token.token_id, *(one.token.token_id for one in rest)] == expected
            [sent] = await reader.wait_for("KvSent", "r")
            assert sent.transfer.transport == "shm"
            for child in (reading, writing):
                child.send_signal(signal.SIGTERM)
            assert [await asyncio.wait_for(child.wait(), 10) for child in (reading, writing)] == [0, 0]

    asyncio.run(run())


def greedy_answer_in_chunks(engine, prompt, max_tokens) -> list[int]:
    """The engine takes 64 rows at most; how a prompt is cut does not matter to it."""
    limited, whole = engine.forward, engine

    class InChunks:
        kv = whole.kv

        def forward(self, batch):
            rows = len(batch.tokens)
            for begin in range(0, rows, 64):
                end = min(rows, begin + 64)
                output = limited(
                    replace(
                        batch,
                        tokens=batch.tokens[begin:end],
                        row_starts=batch.row_starts * 0 + [0, end - begin],
                        first_positions=batch.first_positions + begin,
                        logit_rows=batch.logit_rows * 0 + end - begin - 1,
                    )
                )
            return output

    return greedy_answer(InChunks(), prompt, max_tokens)


def mapped_rings(pid: int) -> set[str]:
    """Names of the shared memory of senders that a process has mapped."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if "edgellm-kv-" in line}


def test_a_killed_sender_leaves_no_block(tiny_bundle):
    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            reading, reader = await stack.enter_async_context(
                process(orchestrator, tiny_bundle, "reader", "prefill-tp0of1")
            )
            _, writer = await stack.enter_async_context(process(orchestrator, tiny_bundle, "writer", "decode-pp0of1"))
            for number in range(3):
                wish = generation(30)
                reader.send(prefill=prefill(f"r{number}", random_prompt(250), wish, targets=[kv_target(writer)]))
            await reader.wait_for("PrefillDone", "r0")
            reading.kill()
            for number in range(3):
                writer.send(release=cluster_pb2.Release(attempt=attempt(f"r{number}")))
                await writer.wait_for("Released", f"r{number}")
            await eventually(lambda: writer.heartbeat.kv_blocks_free == 32)

    asyncio.run(run())


def test_a_sender_killed_while_idle_and_started_again_leaves_no_mapping(tiny_bundle):
    async def run() -> None:
        async with AsyncExitStack() as stack:
            orchestrator = await stack.enter_async_context(orchestrating())
            _, writer = await stack.enter_async_context(process(orchestrator, tiny_bundle, "writer", "decode-pp0of1"))
            rings = []
            for number in range(2):
                async with process(orchestrator, tiny_bundle, "reader", "prefill-tp0of1") as (_, reader):
                    wish = generation(30)
                    reader.send(prefill=prefill(f"r{number}", random_prompt(50), wish, targets=[kv_target(writer)]))
                    await reader.wait_for("KvSent", f"r{number}")
                    rings.append(mapped_rings(writer.hello.pid))
                del orchestrator.nodes["reader"]
            assert [len(mapped) for mapped in rings] == [1, 1]
            assert rings[0] != rings[1]

    asyncio.run(run())


def test_metrics_are_served(tiny_bundle):
    async def run() -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        async with (
            orchestrating() as orchestrator,
            process(orchestrator, tiny_bundle, "n", "decode-pp0of1", "--metrics-port", str(port)) as (_, joined),
        ):
            joined.send(prefill=prefill("r", [1, 2, 3], generation(1)))
            await joined.wait_for("PrefillDone", "r")
            await eventually(lambda: joined.heartbeat.steps == 1)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=5)
            url = f"http://127.0.0.1:{port}/metrics"
            page = (await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=5).read())).decode()
            assert "edgellm_tokens_generated_total 1.0" in page
            assert 'edgellm_rows_total{kind="prefill"} 3.0' in page

    asyncio.run(run())


def test_a_node_ends_with_the_process_that_started_it(tiny_bundle):
    async def run() -> None:
        async with orchestrating() as orchestrator:
            command = start(tiny_bundle, "--exit-with-parent", orchestrator=orchestrator.address)
            code = "import subprocess, sys; subprocess.Popen(sys.argv[1:]).wait()"
            parent = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, *command, stderr=subprocess.DEVNULL
            )
            joined = await orchestrator.node("n")
            child = psutil.Process(joined.hello.pid)
            parent.kill()
            await parent.wait()
            await eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)

    asyncio.run(run())


def test_an_unreachable_orchestrator_is_named(tiny_bundle):
    assert "no orchestrator at 127.0.0.1:1 for 0.2 s" in refusal(start(tiny_bundle))


def test_a_refusal_of_the_orchestrator_is_passed_on(tiny_bundle):
    async def run() -> str:
        async with orchestrating() as orchestrator:
            orchestrator.refuse_with = "another bundle; restart it with --bundle X"
            return await asyncio.to_thread(refusal, start(tiny_bundle, orchestrator=orchestrator.address))

    assert "restart it with --bundle X" in asyncio.run(run())


def test_a_node_that_listens_everywhere_tells_others_an_address_they_can_dial(tiny_bundle):
    async def run() -> None:
        async with (
            orchestrating() as orchestrator,
            process(orchestrator, tiny_bundle, "n", "decode-pp0of1", "--listen", "0.0.0.0:0") as (_, joined),
        ):
            assert joined.hello.exchange_address.startswith("127.0.0.1:")

    asyncio.run(run())
    unknown = start(tiny_bundle, "--listen", "0.0.0.0:0", orchestrator="nowhere.invalid:1")
    assert "--listen" in refusal(unknown)


def test_ports_in_use_are_named(tiny_bundle):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in refusal(start(tiny_bundle, "--listen", f"127.0.0.1:{port}"))
        for number in (port, 65536):
            assert f"port {number}" in refusal(start(tiny_bundle, "--metrics-port", str(number)))


def test_wrong_bundles_and_engines_are_named(tiny_bundle, tmp_path):
    assert str(tmp_path) in refusal(start(tmp_path))
    assert "'decode-pp1of2'" in refusal(start(tiny_bundle, engine="decode-pp1of2"))
    assert "GiB" in refusal(start(tiny_bundle, "--kv-blocks", str(10**9)))
    assert "orin-nano-8gb" in refusal(start(tiny_bundle, "--device-class", "orin-nano-8gb"))
    [*command] = start(tiny_bundle)
    del command[command.index("--kv-blocks") : command.index("--kv-blocks") + 2]
    assert "--kv-blocks" in refusal(command)


@pytest.mark.parametrize("option", [("--orchestrator", "nowhere"), ("--kv-blocks", "0"), ("--kv-codec", "int3")])
def test_wrong_options_are_usage_errors(tiny_bundle, option):
    done = subprocess.run(start(tiny_bundle, *option), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert option[0] in done.stderr
