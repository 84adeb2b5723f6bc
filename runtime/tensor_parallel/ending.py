"""How a rank ends when another one has gone."""

import os
import sys
from typing import NoReturn

from edgellm.runtime.config import NodeError


def leave(error: NodeError) -> NoReturn:
    """End this process now, with a line that says why.

    Its engine may be in a sum to which a stopped rank does not come. Gloo lets nobody out of that before its own
    timeout, the end of the interpreter included, and whatever an orderly end would give back goes with the process.
    """
    print(f"edgellm-node: {error}", file=sys.stderr, flush=True)
    os._exit(1)
