"""The edgellm command: generate, chat, status."""

import argparse
import os
import sys
from collections.abc import Sequence

from edgellm.orchestrator.arguments import integer_from
from edgellm.orchestrator.cli_generate import add_generate_arguments, chat, generate
from edgellm.orchestrator.cli_status import status
from edgellm.orchestrator.client import ClientError

INTERRUPTED = 130
DEFAULT_SERVER = "127.0.0.1:50051"


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except ClientError as error:
        print(f"edgellm: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the answer has gone; the interpreter's last flush must not fail over it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="edgellm", description="Ask an EdgeLLM cluster.")
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("generate", help="answer one prompt")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text; `-` reads it from standard input, up to its last newline")
    what.add_argument("--resume", metavar="ID", help="take up the answer to an earlier request")
    command.add_argument(
        "--from-index",
        type=integer_from(0, 2**32 - 1),
        default=0,
        help="first token wanted with --resume (%(default)s)",
    )
    command.add_argument("--raw", action="store_true", help="continue the text itself, without the chat template")
    command.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    add_generate_arguments(command)
    command.set_defaults(run=generate)

    command = commands.add_parser("chat", help="talk; an empty line or Ctrl-D ends it")
    add_generate_arguments(command)
    command.set_defaults(run=chat)

    command = commands.add_parser("status", help="show the nodes")
    command.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    command.set_defaults(run=status)

    for command in commands.choices.values():
        command.add_argument("--server", default=DEFAULT_SERVER, help="host:port of edgellm-serve (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
