"""`python -m bench NAME [--json]`: measure one part of the project and hold it to its targets."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from edgellm.builder.errors import BuildError
from edgellm.orchestrator.local_cluster import ClusterStartError

NAMES = ("engine", "failover", "gpu", "kernels", "sharing", "stages", "system", "variants")
WIDTH = 160
"""Of tables that go to a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Each benchmark is a module with `add_arguments(parser)` and `run(options) -> Report`."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    subparsers = parser.add_subparsers(dest="name", required=True)
    modules = {name: importlib.import_module(f"bench.{name}") for name in _wanted(arguments)}
    for name, module in modules.items():
        subparser = subparsers.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        subparser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        module.add_arguments(subparser)
    options = parser.parse_args(arguments)
    try:
        report = modules[options.name].run(options)
    except (ValueError, BuildError, ClusterStartError) as error:
        print(f"bench {options.name}: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(report.as_json())
    else:
        report.show(Console(width=None if sys.stdout.isatty() else WIDTH))
    return 0


def _wanted(arguments: Sequence[str] | None) -> Sequence[str]:
    """Only the named benchmark is imported: others may need packages that it does not."""
    given = sys.argv[1:] if arguments is None else arguments
    return [given[0]] if given and given[0] in NAMES else NAMES


def _end(number: int, _: object) -> None:
    """Leave by the way that stops what was started: drivers, servers, clusters."""
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    sys.exit(main())
