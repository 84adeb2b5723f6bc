"""Simulated time: a heap of things to do, and ordered channels with delay."""

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Message = TypeVar("Message")


class Timeline:
    """Runs actions in order of time; equal times in order of scheduling."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._scheduled = 0

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now_s + delay_s, action)

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Times in the past mean now."""
        self._scheduled += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._scheduled, action))

    def step(self) -> bool:
        """Run the next action; False if there is none."""
        if not self._heap:
            return False
        self.now_s, _, action = heapq.heappop(self._heap)
        action()
        return True


class Channel(Generic[Message]):
    """One direction of a stream: nothing is lost or overtaken, everything is late."""

    def __init__(self, timeline: Timeline, delay_s: Callable[[], float], deliver: Callable[[Message], None]) -> None:
        self._timeline = timeline
        self._delay_s = delay_s
        self._deliver = deliver
        self._last_s = 0.0
        self._open = True

    def send(self, message: Message) -> None:
        self._last_s = max(self._last_s, self._timeline.now_s + self._delay_s())
        self._timeline.at(self._last_s, lambda: self._arrive(message))

    def cut(self) -> None:
        """What is under way is lost."""
        self._open = False

    def _arrive(self, message: Message) -> None:
        if self._open:
            self._deliver(message)
