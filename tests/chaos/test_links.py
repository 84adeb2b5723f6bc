"""Every link between processes blocks, delays, is cut and damages bytes; the client sees the tokens of a calm run."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest

from edgellm.orchestrator.client import connect
from edgellm.orchestrator.process_cluster import ProcessCluster
from tests.chaos.answers import ask
from tests.chaos.conftest import ROOM
from tests.chaos.links import Links
from tests.runtime.proxy import Proxy, Way

BLOCKED_S = 1.5
"""A client's own link works again after so long; all others stay as they are until the answer is there."""
DELAY_S = 0.003
KILLED_AT = 100
"""With so many tokens copies are needed, where their link is what broke."""


@dataclass(frozen=True, kw_only=True)
class Link:
    proxy: Callable[[Links], Proxy]
    moment: str | int
    """When it goes wrong: before the request, or with so many tokens."""
    damage: bytes
    """Before the byte that is damaged. Payloads have checksums; what has none is damaged where HTTP/2 has its own
    fields, because nothing but TCP guards it."""
    damaged_way: Way = "up"


LINKS = {
    "client": Link(proxy=lambda links: links.client, moment=40, damage=b"", damaged_way="down"),
    "join": Link(proxy=lambda links: links.joins["second"], moment=40, damage=b""),
    "KV": Link(proxy=lambda links: links.exchanges["first"], moment="before", damage=b"raw\x49"),
    "steps": Link(proxy=lambda links: links.exchanges["second"], moment=40, damage=b"\x20\x01\x22\x80\x01"),
    "copies": Link(proxy=lambda links: links.exchanges["spare"], moment=3, damage=b"\x0a\x80\x0c"),
}
FAULTS: dict[str, Callable[[Proxy, Link], None]] = {
    "blocked": lambda proxy, _: proxy.block("up", "down"),
    "blocked upwards": lambda proxy, _: proxy.block("up"),
    "blocked downwards": lambda proxy, _: proxy.block("down"),
    "slow": lambda proxy, _: setattr(proxy, "delay_s", DELAY_S),
    "cut": lambda proxy, _: proxy.cut(),
    "damaged": lambda proxy, link: damage(proxy, link),
}
QUICK = {
    ("client", "cut"),
    ("join", "blocked upwards"),
    ("KV", "damaged"),
    ("steps", "blocked"),
    ("copies", "blocked downwards"),
}
CASES = [
    pytest.param(*case, id=f"{case[0]} {case[1]}", marks=[] if case in QUICK else [pytest.mark.slow])
    for case in product(LINKS, FAULTS)
]


def damage(proxy: Proxy, link: Link) -> None:
    proxy.damaged_way = link.damaged_way
    proxy.damage = link.damage, 1


@pytest.fixture(scope="module")
def node_options() -> Sequence[str]:
    """All bytes go through the proxies."""
    return (*ROOM, "--no-shm")


@contextmanager
def mended_after(proxy: Proxy, seconds: float) -> Iterator[Callable[[], None]]:
    """What the yielded function starts."""
    timer = threading.Timer(seconds, proxy.heal)
    yield timer.start
    timer.cancel()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "fault"), CASES)
def test_a_broken_link_changes_no_token(
    name: str, fault: str, whole_cluster: ProcessCluster, links: Links, calm: list[int]
) -> None:
    link = LINKS[name]
    proxy = link.proxy(links)

    def at(now: str | int) -> None:
        if now == link.moment:
            FAULTS[fault](proxy, link)
            if name == "client":
                mend()
        if name == "copies" and now == KILLED_AT:
            whole_cluster.signal("second", signal.SIGKILL)

    at("before")
    with mended_after(proxy, BLOCKED_S) as mend, connect(links.client.address) as stub:
        ask(stub, at).check(calm)
    if fault == "damaged" and name != "client":
        assert proxy.damage == (link.damage, 0)
