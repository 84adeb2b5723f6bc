"""Whose processor time was it?"""

import os
import subprocess
import sys

import pytest

from bench.busy import (
    BUSY_SHARE,
    CpuShares,
    CpuTimes,
    descendants,
    family,
    parse_machine,
    parse_process,
    read_times,
    shares,
)

STAT = """cpu  1000 200 300 9000 50 10 40 70 500 0
cpu0 500 100 150 4500 25 5 20 35 250 0
intr 12345
"""


def test_machine_times_leave_out_idling_waiting_and_theft() -> None:
    assert parse_machine(STAT, ticks_per_s=100) == (15.5, 0.7)


@pytest.mark.parametrize("text", ["cpu0 1 2 3 4 5 6 7 8\n", "cpu 1 2 3\n"])
def test_another_format_is_refused_by_its_first_line(text: str) -> None:
    with pytest.raises(ValueError, match="begins with"):
        parse_machine(text, ticks_per_s=100)


def test_a_process_may_be_named_like_anything() -> None:
    stat = "42 (a) R (b c) S 1 42 42 0 -1 4194560 100 0 0 0 150 50 25 75 20 0 8 0 100 0"
    assert parse_process(stat, ticks_per_s=100) == 3.0


def times(at_s: float, busy_s: float, ours_s: float, stolen_s: float = 0.0) -> CpuTimes:
    return CpuTimes(at_s=at_s, busy_s=busy_s, ours_s=ours_s, stolen_s=stolen_s)


def test_shares_are_of_all_cores() -> None:
    found = shares(times(0, 100, 50), times(10, 112, 58, stolen_s=1), cores=2)
    assert found == CpuShares(others=0.2, stolen=0.05)


def test_clock_ticks_never_make_a_share_negative() -> None:
    assert shares(times(0, 100, 50), times(1, 100, 50.02), cores=2) == CpuShares(others=0, stolen=0)


def test_theft_by_the_host_counts_as_busy() -> None:
    assert CpuShares(others=0, stolen=2 * BUSY_SHARE).is_busy
    assert not CpuShares(others=BUSY_SHARE / 2, stolen=0).is_busy


def test_descendants_are_found_at_any_depth() -> None:
    assert sorted(descendants(10, {10: 1, 11: 10, 12: 11, 13: 1, 14: 13})) == [10, 11, 12]


def test_a_childs_time_is_ours() -> None:
    burn = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        pids = [pid for pid in family(os.getpid()) if pid != os.getpid()]
        assert child.pid in pids
        assert read_times(pids).ours_s - read_times([]).ours_s >= 0.1
        child.communicate(b"\n")


def test_a_process_that_ended_has_no_time_of_its_own() -> None:
    assert read_times([2**30]).ours_s >= 0
