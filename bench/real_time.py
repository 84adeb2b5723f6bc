"""A real-time scheduler for what is measured: a thread that waits for a core then waits for nobody else's tick."""

import contextlib
import os
from collections.abc import Iterator

from bench.peers.drivers.driver_protocol import REAL_TIME_PRIORITY


@contextlib.contextmanager
def real_time(*, wanted: bool) -> Iterator[None]:
    """SCHED_RR for this thread and the threads it starts meanwhile, where wanted and permitted."""
    before = os.sched_getscheduler(0)
    try:
        if wanted:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REAL_TIME_PRIORITY))
    except PermissionError:
        yield
        return
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))
