"""Handshakes are forgotten when they are of no use, and there are never more than a bound."""

import pytest

from edgellm.runtime.kv.sessions import Session, Sessions, SessionsFullError
from edgellm.runtime.transports.grpc import GrpcIncoming


def shake_hands(sessions: Sessions, node_id: str, name: str) -> Session:
    session = Session(node_id=node_id, incoming=GrpcIncoming())
    sessions.open(name, session)
    return session


def known(sessions: Sessions, *names: str) -> list[str]:
    return [name for name in names if sessions.get(name) is not None]


def test_a_new_handshake_replaces_the_idle_ones_of_its_sender():
    sessions = Sessions(limit=8)
    busy = shake_hands(sessions, "a", "a/1")
    with sessions.stream("a/1", busy):
        shake_hands(sessions, "a", "a/2")
        shake_hands(sessions, "b", "b/1")
        shake_hands(sessions, "a", "a/3")
        assert known(sessions, "a/1", "a/2", "a/3", "b/1") == ["a/1", "a/3", "b/1"]


def test_the_oldest_idle_sender_makes_room_and_busy_ones_do_not():
    sessions = Sessions(limit=3)
    busy = shake_hands(sessions, "a", "a/1")
    with sessions.stream("a/1", busy):
        for node_id in "bcd":
            shake_hands(sessions, node_id, f"{node_id}/1")
        assert known(sessions, "a/1", "b/1", "c/1", "d/1") == ["a/1", "c/1", "d/1"]
        shake_hands(sessions, "d", "d/2")
        assert known(sessions, "a/1", "c/1", "d/1", "d/2") == ["a/1", "c/1", "d/2"]


def test_where_all_are_busy_the_next_sender_is_refused():
    sessions = Sessions(limit=1)
    busy = shake_hands(sessions, "a", "a/1")
    with sessions.stream("a/1", busy), pytest.raises(SessionsFullError, match="1 senders"):
        shake_hands(sessions, "b", "b/1")
    assert known(sessions, "a/1", "b/1") == ["a/1"]


def test_a_session_ends_with_the_last_of_its_streams_that_breaks():
    sessions = Sessions(limit=2)
    session = shake_hands(sessions, "a", "a/1")
    with sessions.stream("a/1", session):
        with pytest.raises(ConnectionError), sessions.stream("a/1", session):
            raise ConnectionError
        assert known(sessions, "a/1") == ["a/1"]
    with pytest.raises(ConnectionError), sessions.stream("a/1", session):
        raise ConnectionError
    assert known(sessions, "a/1") == []
