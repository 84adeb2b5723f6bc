"""The demonstration: build both engines from one checkpoint, serve them, ask two questions, say what it took."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgellm.orchestrator import cli
from edgellm.orchestrator.local_cluster import ClusterStartError, serve

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
QUESTIONS = {"What is the capital of France?": "What is the capital of France?", "A passage to summarise": PASSAGE}


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
    except ClusterStartError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def build(console: Console, checkpoint: str, bundle: Path) -> None:
    """Raises CalledProcessError; edgellm-build has then said why."""
    console.rule("edgellm-build: half-precision prefill, INT4-AWQ decode")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "edgellm.builder.cli", "--checkpoint", checkpoint, "--output", str(bundle)]
    subprocess.run(command, check=True)


def ask_questions(console: Console, bundle: Path) -> int:
    """Serve the bundle from processes of their own and stream the answers; the exit status of the last that failed."""
    console.rule("edgellm-serve: orchestrator, prefill node, decode node")
    with serve(bundle) as cluster:
        status = cli.main(["status", "--server", cluster.address])
        for title, question in QUESTIONS.items():
            console.rule(title)
            asked = ["generate", "--server", cluster.address, "--prompt", question, "--max-tokens", "96", "--stats"]
            status = cli.main(asked) or status
        console.rule("what each process used")
        status = cli.main(["status", "--server", cluster.address]) or status
        console.print(f"orchestrator: {resident_mib(cluster.process.pid):.0f} MiB")
    console.print("everything is stopped")
    return status


def resident_mib(pid: int) -> float:
    """Physical memory of a process, from Linux's /proc."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
