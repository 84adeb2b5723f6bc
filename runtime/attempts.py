"""Which attempts are live on this node, which are stale, and which wait for somebody to decide about them."""

from collections.abc import Callable, Iterable, Iterator

from edgellm.runtime.kv.fence import EpochFence
from edgellm.runtime.kv.types import Attempt, RequestId


class Attempts:
    """At most one attempt of a request is live."""

    def __init__(self) -> None:
        self.fence = EpochFence()
        self._live: dict[RequestId, Attempt] = {}
        self._decide_by_s: dict[Attempt, float] = {}
        self._unanswered_releases: list[Attempt] = []
        self.highest_epoch = 0
        """Of all attempts this process has heard of."""
        self._first_epoch: int | None = None

    def __iter__(self) -> Iterator[Attempt]:
        """The live ones, as they are now."""
        return iter(list(self._live.values()))

    def is_live(self, attempt: Attempt) -> bool:
        return self._live.get(attempt.request_id) == attempt

    def live(self, request_id: RequestId) -> Attempt | None:
        return self._live.get(request_id)

    # Admission

    def welcome(self, first_epoch: int) -> None:
        """An orchestrator counts this node's blocks: those that are held now, and of attempts from this epoch on."""
        self._first_epoch = first_epoch

    def orchestrator_lost(self) -> None:
        """Until the next welcome, nobody would count the blocks of a new attempt. What is stale stays so."""
        self._first_epoch = None
        self._unanswered_releases.clear()

    @property
    def is_counted(self) -> bool:
        """Whether an orchestrator counts what begins here."""
        return self._first_epoch is not None

    def admits(self, attempt: Attempt) -> bool:
        """What is live goes on; what is not may begin if its orchestrator is this node's and it is not stale."""
        if self.is_live(attempt):
            return True
        return self._first_epoch is not None and attempt.epoch >= self._first_epoch and self.fence.admits(attempt)

    def enter(self, attempt: Attempt) -> None:
        """The request's live attempt, from now on; older ones are stale."""
        self._hear_of(attempt)
        self.fence.enter(attempt)
        self._live[attempt.request_id] = attempt

    def leave(self, attempt: Attempt) -> None:
        """No effect if it is not live."""
        if self.is_live(attempt):
            del self._live[attempt.request_id]
        self._decide_by_s.pop(attempt, None)

    def _hear_of(self, attempt: Attempt) -> None:
        self.highest_epoch = max(self.highest_epoch, attempt.epoch)

    # Leases

    def await_decision(self, attempt: Attempt, until_s: float) -> None:
        """Somebody must resume or release it until then."""
        self._decide_by_s[attempt] = until_s

    def decided(self, attempt: Attempt) -> None:
        """Somebody did, before it had come to this."""
        self._decide_by_s.pop(attempt, None)

    def undecided(self, now_s: float) -> list[Attempt]:
        """Those that waited for too long."""
        return [attempt for attempt, until_s in self._decide_by_s.items() if until_s <= now_s]

    # Releases

    def release(self, attempt: Attempt) -> None:
        """It and older attempts are stale; `answered` will name it."""
        self._hear_of(attempt)
        self.fence.close(attempt)
        self.tell_when_free(attempt)

    def tell_when_free(self, attempt: Attempt) -> None:
        """`answered` will name it when its blocks are free, and those of older epochs."""
        self._unanswered_releases.append(attempt)

    def answered(self, holders: Callable[[], Iterable[Attempt]]) -> list[Attempt]:
        """Attempts of which no block is held any more, by this epoch or an older one; each is named once."""
        if not self._unanswered_releases:
            return []
        oldest: dict[RequestId, int] = {}
        for holder in holders():
            oldest[holder.request_id] = min(holder.epoch, oldest.get(holder.request_id, holder.epoch))
        free = [one for one in self._unanswered_releases if oldest.get(one.request_id, one.epoch + 1) > one.epoch]
        self._unanswered_releases = [one for one in self._unanswered_releases if one not in free]
        return free
