"""What to send next to one holder of copies: pure, told the time, one per pair of nodes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edgellm.runtime.kv.types import Attempt

CopyCodec: TypeAlias = Literal["raw", "int8"]


@dataclass(frozen=True, kw_only=True)
class CopyConfig:
    """How closely copies follow, and how long a holder may fall behind."""

    codec: CopyCodec = "raw"
    """`int8` halves the bytes; what is replayed after a takeover may then differ."""
    batch_tokens: int = 6
    """New positions of one request that are sent at once, with those of all others."""
    new_tokens: int = 16
    """A copy with more than this to send is behind, and is sent in larger parts after what is new of others."""
    max_wait_s: float = 0.25
    """After which any new position is sent."""
    retry_s: float = 0.05
    """After which refused rows are sent again."""
    message_bytes: int = 1 << 20
    window_bytes: int = 4 << 20
    """Payload that may be unacknowledged."""
    max_lag_tokens: int = 64
    """A copy that is further behind must be catching up."""
    patience_s: float = 2.0
    """Within which a copy too far behind must gain, refused rows be taken, and a message be answered."""
    linger_s: float = 10.0
    """How long a stream without copies stays open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyKey:
    """One stage's layers of one attempt."""

    attempt: Attempt
    layers: range


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Positions of one copy to be sent, or on their way."""

    key: CopyKey
    tokens: range


Refusal: TypeAlias = Literal["again", "never"]
"""What to do about rows that the holder did not take."""


@dataclass(kw_only=True, eq=False)
class _Copy:
    sent: int
    acknowledged: int
    computed: int
    due_s: float
    """When what is unsent goes out, however little it is."""
    least_lag: int
    gained_s: float
    """When the lag was last small enough, or smaller than before."""
    refused_s: float | None = None
    """Since when rows are refused."""
    not_before_s: float = 0.0

    @property
    def unsent(self) -> int:
        return self.computed - self.sent

    @property
    def lag(self) -> int:
        return self.computed - self.acknowledged


class CopyQueue:
    """Copies to one holder, each from some position on and in order.

    New positions of all copies share a message, which goes out when one of them has `batch_tokens` or is due. A copy
    with more to catch up on than `new_tokens` is sent in parts near `message_bytes`, copies in turn, only when nothing
    new is due and less than one such part is on its way.
    """

    def __init__(self, config: CopyConfig, *, bytes_per_layer: int) -> None:
        """`bytes_per_layer`: of one token on the wire."""
        self._config = config
        self._bytes_per_layer = bytes_per_layer
        self._copies: dict[CopyKey, _Copy] = {}
        """Least recently caught up first."""
        self._in_flight_bytes = 0

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def keys(self) -> list[CopyKey]:
        return list(self._copies)

    @property
    def lag(self) -> int:
        """Tokens that the copy furthest behind lacks."""
        return max((copy.lag for copy in self._copies.values()), default=0)

    def start(self, key: CopyKey, *, first_token: int, computed: int, now_s: float) -> None:
        """Keep a copy of everything from `first_token` on, of which positions below `computed` exist."""
        self._copies[key] = _Copy(
            sent=first_token,
            acknowledged=first_token,
            computed=max(computed, first_token),
            due_s=now_s + self._config.max_wait_s,
            least_lag=computed - first_token,
            gained_s=now_s,
        )

    def advance(self, key: CopyKey, computed: int, now_s: float) -> None:
        """Positions below `computed` exist. No effect if there is no such copy."""
        copy = self._copies.get(key)
        if copy is None or computed <= copy.computed:
            return
        if not copy.unsent:
            copy.due_s = now_s + self._config.max_wait_s
        if copy.lag <= self._config.max_lag_tokens:
            copy.gained_s = now_s
        copy.computed = computed

    def stop(self, key: CopyKey) -> None:
        """Nothing more of this copy is sent. No effect if there is no such copy."""
        self._copies.pop(key, None)

    def take(self, now_s: float) -> list[Rows]:
        """The next message, which counts as sent; empty if nothing is due or too much is on its way."""
        if self._in_flight_bytes >= self._config.window_bytes:
            return []
        rows = self._new(now_s) or self._behind(now_s)
        for one in rows:
            copy = self._copies[one.key]
            copy.sent, copy.due_s = one.tokens.stop, now_s + self._config.max_wait_s
            self._in_flight_bytes += self._bytes(one)
        return rows

    def answered(self, rows: Sequence[Rows], refused: Mapping[int, Refusal], now_s: float) -> list[CopyKey]:
        """The holder has answered a message; `refused` by index. Returns the copies that ended thereby."""
        ended = []
        for index, one in enumerate(rows):
            self._in_flight_bytes -= self._bytes(one)
            copy = self._copies.get(one.key)
            if copy is None:
                continue
            if index not in refused:
                self._taken(copy, one.tokens, now_s)
            elif not self._refused(copy, one.tokens, refused[index], now_s):
                del self._copies[one.key]
                ended.append(one.key)
        return ended

    def give_up(self, now_s: float) -> CopyKey | None:
        """End the copy that is furthest behind, if it is too far and did not gain in time; others get more time."""
        late = [
            (copy.lag, key)
            for key, copy in self._copies.items()
            if copy.lag > self._config.max_lag_tokens and now_s - copy.gained_s > self._config.patience_s
        ]
        if not late:
            return None
        _, worst = max(late, key=lambda one: one[0])
        del self._copies[worst]
        for copy in self._copies.values():
            copy.gained_s = now_s
        return worst

    def restart(self) -> None:
        """What is on its way will not be answered: send it again."""
        self._in_flight_bytes = 0
        for copy in self._copies.values():
            copy.sent = min(copy.sent, copy.acknowledged)

    def wake_s(self) -> float | None:
        """When `take` will have something if nothing is added or answered before; None: never."""
        if self._in_flight_bytes >= self._config.window_bytes:
            return None
        only_new = self._in_flight_bytes >= self._config.message_bytes
        times = [
            copy.not_before_s if copy.unsent >= self._config.batch_tokens else max(copy.due_s, copy.not_before_s)
            for copy in self._copies.values()
            if 0 < copy.unsent <= self._config.new_tokens or (copy.unsent and not only_new)
        ]
        return min(times, default=None)

    def _new(self, now_s: float) -> list[Rows]:
        config = self._config
        new = {key: copy for key, copy in self._ready(now_s) if copy.unsent <= config.new_tokens}
        if not any(copy.unsent >= config.batch_tokens or copy.due_s <= now_s for copy in new.values()):
            return []
        rows: list[Rows] = []
        room_bytes = config.message_bytes
        for key, copy in sorted(new.items(), key=lambda item: item[1].due_s):
            one = Rows(key=key, tokens=range(copy.sent, copy.computed))
            if rows and self._bytes(one) > room_bytes:
                break
            rows.append(one)
            room_bytes -= self._bytes(one)
        return rows

    def _behind(self, now_s: float) -> list[Rows]:
        config = self._config
        if self._in_flight_bytes >= config.message_bytes:
            return []
        for key, copy in self._ready(now_s):
            if copy.unsent > config.new_tokens:
                self._copies[key] = self._copies.pop(key)
                tokens = max(1, config.message_bytes // (self._bytes_per_layer * len(key.layers)))
                return [Rows(key=key, tokens=range(copy.sent, min(copy.sent + tokens, copy.computed)))]
        return []

    def _ready(self, now_s: float) -> list[tuple[CopyKey, _Copy]]:
        return [(key, copy) for key, copy in self._copies.items() if copy.unsent and copy.not_before_s <= now_s]

    def _taken(self, copy: _Copy, tokens: range, now_s: float) -> None:
        copy.refused_s = None
        if tokens.start <= copy.acknowledged:
            copy.acknowledged = max(copy.acknowledged, tokens.stop)
        if copy.lag < max(copy.least_lag, self._config.max_lag_tokens + 1):
            copy.least_lag, copy.gained_s = copy.lag, now_s

    def _refused(self, copy: _Copy, tokens: range, refusal: Refusal, now_s: float) -> bool:
        """Whether the copy goes on: then everything from these rows on is sent again, a moment later."""
        copy.refused_s = now_s if copy.refused_s is None else copy.refused_s
        copy.sent = min(copy.sent, tokens.start)
        copy.not_before_s = now_s + self._config.retry_s
        return refusal == "again" and now_s - copy.refused_s <= self._config.patience_s

    def _bytes(self, rows: Rows) -> int:
        return len(rows.tokens) * len(rows.key.layers) * self._bytes_per_layer
