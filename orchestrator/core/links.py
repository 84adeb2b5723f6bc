"""Which links between nodes failed lately: others are used instead, for a while."""

from dataclasses import dataclass
from typing import TypeAlias

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.values import ConnectionId


@dataclass(frozen=True, kw_only=True)
class _Failure:
    pause_s: float
    until_s: float


Link: TypeAlias = tuple[ConnectionId, ConnectionId]
"""From the first to the second."""


class Links:
    """One direction each. They are known by connection: a node that comes back is not held to what was before."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self._failures: dict[Link, _Failure] = {}

    @property
    def ends(self) -> set[ConnectionId]:
        """Nodes of which anything is remembered."""
        return {end for link in self._failures for end in link}

    def failed(self, now_s: float, source: ConnectionId, target: ConnectionId) -> float:
        """Avoid it from now on. Returns for how long: twice as long as the last time, unless it worked since."""
        before = self._failures.get((source, target))
        wanted_s = self._config.link_pause_s if before is None else 2 * before.pause_s
        pause_s = min(wanted_s, self._config.longest_link_pause_s)
        self._failures[source, target] = _Failure(pause_s=pause_s, until_s=now_s + pause_s)
        return pause_s

    def worked(self, source: ConnectionId, target: ConnectionId) -> None:
        self._failures.pop((source, target), None)

    def avoided_until_s(self, source: ConnectionId, target: ConnectionId) -> float:
        """0 for one that has not failed."""
        failure = self._failures.get((source, target))
        return 0.0 if failure is None else failure.until_s

    def avoided_from(self, now_s: float, source: ConnectionId) -> frozenset[ConnectionId]:
        """The nodes that this one should send nothing to."""
        return frozenset(target for one, target in self.avoided(now_s) if one == source)

    def avoided(self, now_s: float) -> frozenset[Link]:
        return frozenset(link for link, failure in self._failures.items() if now_s < failure.until_s)

    def forget(self, connection: ConnectionId) -> None:
        """The node is gone."""
        self._failures = {link: failure for link, failure in self._failures.items() if connection not in link}
