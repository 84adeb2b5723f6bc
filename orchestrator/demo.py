"""The demonstration: build both engines from one checkpoint, serve them, ask two questions, say what it took."""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from edgellm.orchestrator import cli
from edgellm.orchestrator.local_cluster import ClusterStartError, serve

QUESTIONS = ("What is the capital of France?", "Explain in two sentences why the sky is blue.")


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
    console.rule("edgellm-build: one checkpoint, a half-precision prefill engine and an INT4-AWQ decode engine")
    bundle.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "edgellm.builder.cli", "--checkpoint", checkpoint, "--output", str(bundle)]
    subprocess.run(command, check=True)


def ask_questions(console: Console, bundle: Path) -> int:
    """Serve the bundle from processes of their own and stream the answers; the exit status of the last that failed."""
    console.rule("edgellm-serve: an orchestrator, a prefill node and a decode node")
    with serve(bundle) as cluster:
        status = cli.main(["status", "--server", cluster.address])
        for question in QUESTIONS:
            console.rule(question)
            asked = ["generate", "--server", cluster.address, "--prompt", question, "--max-tokens", "96", "--stats"]
            status = cli.main(asked) or status
        console.rule("what each process used")
        status = cli.main(["status", "--server", cluster.address]) or status
    console.print("everything is stopped")
    return status


if __name__ == "__main__":
    sys.exit(main())
