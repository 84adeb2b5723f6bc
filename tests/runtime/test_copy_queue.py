"""What is sent next to a holder: new positions soon and together, what is behind in turns, and when to give up."""

from hypothesis import given
from hypothesis import strategies as st

from edgellm.runtime.kv.copying.queue import CopyConfig, CopyKey, CopyQueue, Rows
from tests.runtime.copies import attempt

CONFIG = CopyConfig(batch_tokens=4, new_tokens=16, max_wait_s=0.05, message_bytes=400, window_bytes=1200)
A, B, C = (CopyKey(attempt=attempt(name), layers=range(2)) for name in "abc")


def queue(config: CopyConfig = CONFIG) -> CopyQueue:
    """Ten bytes per token and layer: 20 tokens make a message."""
    return CopyQueue(config, bytes_per_layer=10)


@given(st.integers(1, 12), st.integers(0, 3), st.floats(0.001, 0.1))
def test_a_copy_lags_by_a_batch_and_by_what_is_on_its_way(requests, answered_after, step_s):
    one, now_s, wire = queue(CopyConfig(message_bytes=400)), 0.0, []
    keys = [CopyKey(attempt=attempt(f"r{number}"), layers=range(2)) for number in range(requests)]
    for number, key in enumerate(keys):
        one.start(key, first_token=number, computed=number, now_s=now_s)
    for step in range(1, 60):
        now_s += step_s
        for number, key in enumerate(keys):
            one.advance(key, number + step, now_s)
        while rows := one.take(now_s):
            wire.append((step, rows))
        while wire and wire[0][0] + answered_after <= step:
            assert one.answered(wire.pop(0)[1], {}, now_s) == []
        assert one.lag <= 6 + answered_after
        assert one.give_up(now_s) is None


def test_a_position_without_a_successor_goes_out_when_it_is_due():
    one = queue()
    one.start(A, first_token=7, computed=7, now_s=1.0)
    assert one.wake_s() is None
    one.advance(A, 8, 2.0)
    one.advance(A, 9, 2.01)
    assert one.take(2.02) == []
    assert one.wake_s() == 2.05
    assert one.take(2.05) == [Rows(key=A, tokens=range(7, 9))]
    assert one.wake_s() is None


def test_what_is_new_goes_first_and_what_is_behind_takes_turns():
    one = queue()
    one.start(A, first_token=0, computed=50, now_s=0.0)
    one.start(B, first_token=0, computed=30, now_s=0.0)
    one.start(C, first_token=5, computed=5, now_s=0.0)
    assert one.take(0.0) == [Rows(key=A, tokens=range(20))]
    assert one.take(0.0) == []
    one.advance(C, 9, 0.0)
    assert one.take(0.0) == [Rows(key=C, tokens=range(5, 9))]
    one.answered([Rows(key=A, tokens=range(20))], {}, 0.0)
    assert one.take(0.0) == [Rows(key=B, tokens=range(20))]
    one.answered([Rows(key=B, tokens=range(20))], {}, 0.0)
    assert one.take(0.0) == [Rows(key=B, tokens=range(20, 30))]
    assert one.take(0.0) == [Rows(key=A, tokens=range(20, 40))]


def test_refused_rows_come_again_after_a_pause_and_only_for_a_while():
    one = queue()
    one.start(A, first_token=0, computed=4, now_s=0.0)
    now_s = 0.0
    while True:
        rows = one.take(now_s)
        assert rows == [Rows(key=A, tokens=range(4))]
        if one.answered(rows, {0: "again"}, now_s) == [A]:
            break
        assert one.take(now_s) == []
        assert one.wake_s() == now_s + 0.05
        now_s += 0.05
    assert CONFIG.patience_s < now_s < CONFIG.patience_s + 0.2
    assert len(one) == 0


def test_rows_refused_for_good_end_their_copy_alone():
    one = queue()
    for key in (A, B):
        one.start(key, first_token=0, computed=4, now_s=0.0)
    rows = one.take(0.0)
    assert one.answered(rows, {[row.key for row in rows].index(A): "never"}, 0.0) == [A]
    assert one.keys == [B]
    assert one.lag == 0


def test_of_those_that_do_not_gain_the_worst_is_given_up_and_the_others_get_time():
    one = queue()
    one.start(A, first_token=0, computed=100, now_s=0.0)
    one.start(B, first_token=0, computed=200, now_s=0.0)
    one.start(C, first_token=0, computed=60, now_s=0.0)
    assert one.give_up(CONFIG.patience_s) is None
    late_s = CONFIG.patience_s + 0.1
    assert one.give_up(late_s) == B
    assert one.give_up(late_s) is None
    one.answered(one.take(late_s), {}, late_s + 1.0)
    assert one.give_up(late_s + CONFIG.patience_s + 0.5) is None
    assert one.give_up(late_s + CONFIG.patience_s + 1.1) == A
    assert one.keys == [C]


def test_a_burst_after_silence_is_not_held_against_a_copy():
    one = queue()
    one.start(A, first_token=0, computed=0, now_s=0.0)
    one.advance(A, 90, 60.0)
    assert one.give_up(60.1) is None


def test_a_full_window_waits_for_answers_and_a_restart_forgets_them():
    one = queue()
    one.start(A, first_token=0, computed=4, now_s=0.0)
    sent = []
    for step in range(1, 20):
        sent += one.take(float(step))
        one.advance(A, 4 + 4 * step, float(step))
    assert sum(len(rows.tokens) for rows in sent) * 20 < CONFIG.window_bytes + 16 * 20
    assert one.wake_s() is None
    one.restart()
    assert one.take(20.0)[0].tokens.start == 0
