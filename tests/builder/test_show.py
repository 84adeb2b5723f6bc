"""What edgellm-build says while it works."""

import pytest

from edgellm.builder.show import LINE_EVERY_S, ProgressBars


def test_a_long_step_says_how_far_it_is_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now_s = 0.0
    with ProgressBars(lambda: now_s) as bars:
        for done in range(7):
            bars.update("rounding weights", done, 6)
            now_s += LINE_EVERY_S / 2
        bars.update("compile prefill-tp0of1", 0, 9)
    assert capsys.readouterr().err.splitlines() == [
        "rounding weights ...",
        "rounding weights ... 2 of 6",
        "rounding weights ... 4 of 6",
        "compile prefill-tp0of1 ...",
    ]
