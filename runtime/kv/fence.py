"""Which attempts are still wanted: the newest epoch of each request, remembered after the request is gone."""

from collections import OrderedDict

from edgellm.runtime.kv.types import Attempt, RequestId


class EpochFence:
    """Admits attempts whose epoch is not below the request's floor; remembers the last `capacity` requests."""

    def __init__(self, capacity: int = 65536) -> None:
        self._capacity = capacity
        self._floors: OrderedDict[RequestId, int] = OrderedDict()

    def admits(self, attempt: Attempt) -> bool:
        return attempt.epoch >= self._floors.get(attempt.request_id, 0)

    def enter(self, attempt: Attempt) -> None:
        """From now on, older epochs of the request are stale."""
        self._raise_floor(attempt.request_id, attempt.epoch)

    def close(self, attempt: Attempt) -> None:
        """From now on, this epoch and older ones are stale."""
        self._raise_floor(attempt.request_id, attempt.epoch + 1)

    def _raise_floor(self, request_id: RequestId, floor: int) -> None:
        self._floors[request_id] = max(floor, self._floors.get(request_id, 0))
        self._floors.move_to_end(request_id)
        if len(self._floors) > self._capacity:
            self._floors.popitem(last=False)
