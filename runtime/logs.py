"""How a process of the cluster writes its log."""

import logging
import os
import sys


def start_logging(level: int | str) -> None:
    """To standard error. gRPC's own lines, one for every stream that somebody ended, are there for the asking."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
