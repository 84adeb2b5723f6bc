"""The demonstration: build both engines from one checkpoint, serve them, ask two questions, and pull the plug once."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgellm.orchestrator import cli
from edgellm.orchestrator.cli_generate import print_stats
from edgellm.orchestrator.client import ClientError, connect, events
from edgellm.orchestrator.local_cluster import ClusterStartError, LocalCluster, serve
from edgellm.runtime.rpc import inference_pb2
from edgellm.runtime.rpc.inference_pb2_grpc import InferenceStub

PASSAGE = """Summarise this in two sentences.
A language model answers in two phases. First it reads the prompt: all of its tokens go through the network at once,
so every weight that is loaded from memory is used for hundreds of tokens, and the processor's arithmetic is what
limits the speed. Then it writes the answer, one token after the other: every weight is loaded again for every
single token, so the speed of the memory is the limit, and most of the arithmetic units wait. A device that is good
at the one is not always good at the other, and a device that does both lets long prompts get in the way of running
answers, which then stutter. It helps to give each phase its own devices. The reader keeps its weights in half
precision, because it has arithmetic to spare and its results are what everything later builds on. The writer keeps
them in four bits, because then only a quarter of the bytes have to be loaded for a token. What the reader hands
over is the cache of keys and values of every layer: a few kilobytes for each token of the prompt. If it were sent
only after the whole prompt has been read, the first words of the answer would have to wait for the network. So it
is sent in pieces, each while the next piece of the prompt is still being computed, and most of the time on the wire
is hidden behind work that has to be done anyway."""
QUESTION = "What is the capital of France?"
MAX_TOKENS = 96
TOKENS_BEFORE_THE_KILL = 20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="edgellm-demo", description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="model folder, GGUF file or hub name")
    parser.add_argument("--bundle", type=Path, required=True, help="where to build")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        build(console, options.checkpoint, options.bundle)
        return ask_questions(console, options.bundle)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    except (ClientError, ClusterStartError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def build(console: Console, checkpoint: str, bundle: Path) -> None:
    """Raises CalledProcessError; edgellm-build has then said why."""
    console.rule("edgellm-build: half-precision prefill, INT4-AWQ decode")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "edgellm.builder.cli", "--checkpoint", checkpoint, "--output", str(bundle)]
    subprocess.run(command, check=True)


def ask_questions(console: Console, bundle: Path) -> int:
    """Serve the bundle from processes of their own and stream the answers; 1 if something failed, or changed."""
    console.rule("edgellm-serve: orchestrator, prefill node, decode node, and a spare that holds copies of its KV")
    with serve(bundle, options=["--spares", "1"]) as cluster:
        status = cli.main(["status", "--server", cluster.address])
        console.rule(QUESTION)
        asked = ["generate", "--server", cluster.address, "--prompt", QUESTION, "--stats"]
        status = cli.main([*asked, "--max-tokens", str(MAX_TOKENS)]) or status
        status = summarise_twice(console, cluster) or status
        console.rule("what happened, and what each process used")
        status = cli.main(["status", "--server", cluster.address]) or status
        console.print(f"orchestrator: {resident_mib(cluster.process.pid):.0f} MiB")
    console.print("everything is stopped")
    return status


def summarise_twice(console: Console, cluster: LocalCluster) -> int:
    """Once with the decode node killed in the middle, once without: the tokens must be the same."""
    with connect(cluster.address) as stub:
        console.rule("A passage to summarise, and its decode node is killed in the middle of the answer")
        disturbed, finished = stream(console, stub, kill_after=TOKENS_BEFORE_THE_KILL)
        print_stats(finished)
        console.rule("The same passage again, and nobody is killed")
        undisturbed, _ = stream(console, stub, kill_after=None)
    same = disturbed == undisturbed
    console.print(f"the two answers are {'the same, token by token' if same else 'NOT the same'}")
    return 0 if same and finished.takeovers > 0 else 1


def stream(
    console: Console, stub: InferenceStub, *, kill_after: int | None
) -> tuple[list[int], inference_pb2.Finished]:
    """Print the answer as it comes; its tokens, and how it ended."""
    message = inference_pb2.ChatMessage(role="user", content=PASSAGE)
    request = inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[message]), max_tokens=MAX_TOKENS)
    tokens, finished = list[int](), inference_pb2.Finished()
    with contextlib.closing(events(stub, request)) as answer:
        for event in answer:
            match event:
                case inference_pb2.Token():
                    tokens.append(event.token_id)
                    console.print(event.text, end="", markup=False, soft_wrap=True)
                    if len(tokens) == kill_after:
                        console.print(kill_decode_node(stub), end="", style="bold red", markup=False)
                case inference_pb2.Finished():
                    finished = event
                    console.print(event.text, markup=False)
                case inference_pb2.Accepted():
                    pass
    return tokens, finished


def kill_decode_node(stub: InferenceStub) -> str:
    """SIGKILL to the first node that carries layers; what was done, for people."""
    nodes = stub.GetCluster(inference_pb2.GetClusterRequest()).nodes
    victim = next(node for node in nodes if node.role == "decode" and node.layers)
    os.kill(victim.pid, signal.SIGKILL)
    return f" [{victim.node_id} killed] "


def resident_mib(pid: int) -> float:
    """Physical memory of a process, from Linux's /proc."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
