"""An event loop in simulated time that runs many processes, and can kill, pause and slow each of them."""

import asyncio
import contextvars
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

T = TypeVar("T")

KERNEL: Final = contextvars.Context()
"""What is done in it is no process's work."""
_MOST_STEPS: Final = 5_000_000
"""Of one run: more means that something goes round in a circle without time passing."""


class SimulationError(AssertionError):
    """An invariant does not hold."""


@dataclass(kw_only=True, eq=False)
class Process:
    """What runs in `context`, and all that it starts."""

    name: str
    pid: int
    alive: bool = True
    paused: bool = False
    slowness: float = 1.0
    """Its engine steps take longer by this factor."""
    wall_clock_jump_s: float = 0.0
    """By which its clock of the day is wrong; the monotonic one never jumps."""
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    held_back: "list[_Scheduled]" = field(default_factory=list)
    """What fell due while it was paused, or after its end."""

    def __post_init__(self) -> None:
        self.context.run(_process.set, self)


_Scheduled: TypeAlias = tuple[asyncio.Handle, Process | None]
_process: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def current_process() -> Process:
    """The process whose code runs now."""
    process = _process.get()
    if process is None:
        raise SimulationError("this is no process's code")
    return process


@dataclass(kw_only=True)
class _Spending:
    seconds: float = 0.0
    effects: list[Callable[[], None]] = field(default_factory=list)


_spending: contextvars.ContextVar[_Spending] = contextvars.ContextVar("spending")


def spend(seconds: float, effect: Callable[[], None]) -> None:
    """For code on a simulated thread: its result comes `seconds` later, and its effect on memory happens then."""
    _spending.get().seconds += seconds
    _spending.get().effects.append(effect)


class SimulatedLoop(asyncio.AbstractEventLoop):
    """Time jumps to the next timer. What is due at one time runs in the order in which it was scheduled.

    What belongs to a killed process never runs again, nor does its cleaning up, as after SIGKILL; what belongs to a
    paused one runs when it goes on, as after SIGSTOP. Work for threads runs at once, one piece after the other per
    executor, and ends after the time that it says it `spend`s.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._ready: deque[_Scheduled] = deque()
        self._timers: list[tuple[float, int, asyncio.Handle, Process | None]] = []
        self._scheduled = 0
        self._threads: dict[Executor, deque[Callable[[], None]]] = {}
        self._remains: set[asyncio.Task[Any]] = set()
        self.errors: list[str] = []
        """What was raised and nobody caught."""

    def time(self) -> float:
        return self._now_s

    def spawn(self, process: Process, main: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """The process's main task."""
        return asyncio.Task(main, loop=self, context=process.context)

    def kill(self, process: Process) -> None:
        """Nothing of it runs any more. Its tasks are kept: what is collected as garbage would clean up."""
        process.alive = False
        self._remains |= asyncio.all_tasks(self)

    def resume(self, process: Process) -> None:
        """Let a paused process catch up."""
        process.paused = False
        self._ready.extend(process.held_back)
        process.held_back.clear()

    def run_until(self, is_over: Callable[[], bool], until_s: float) -> bool:
        """Returns whether it was over in time. Raises SimulationError for an error that nobody caught."""
        steps = 0
        with self._running():
            while not is_over():
                steps += 1
                if self._now_s > until_s or steps > _MOST_STEPS:
                    return False
                self._step()
                if self.errors:
                    raise SimulationError(self.errors[0])
        return True

    def tear_down(self, processes: Iterable[Process]) -> None:
        """Cancel every task that is left and let it clean up after itself, also those that were killed."""
        for process in processes:
            process.alive = True
            self.resume(process)
        with self._running():
            left = asyncio.all_tasks(self)
            for task in left:
                task.cancel()
            end_s = self._now_s + 1.0
            while left and self._now_s < end_s:
                while self._ready:
                    self._step()
                left = asyncio.all_tasks(self)
                if self._timers:
                    self._step()

    def _step(self) -> None:
        if self._ready:
            handle, process = self._ready.popleft()
        else:
            self._now_s, _, handle, process = heapq.heappop(self._timers)
        if handle.cancelled():
            return
        if process is None or (process.alive and not process.paused):
            handle._run()
        else:
            process.held_back.append((handle, process))

    @contextmanager
    def _running(self) -> Iterator[None]:
        events._set_running_loop(self)
        try:
            yield
        finally:
            events._set_running_loop(None)

    # What asyncio asks of a loop

    def call_soon(  # type: ignore[override]  # the stubs tie the arguments to the callback
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, _process_in(context)))
        return handle

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        when = max(when, self._now_s)
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._scheduled += 1
        heapq.heappush(self._timers, (when, self._scheduled, handle, _process_in(context)))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is skipped when it falls due."""

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]  # the base class has no context before Python 3.11
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Any = None
    ) -> "asyncio.Task[T]":
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(  # type: ignore[override]
        self, executor: Executor | None, func: Callable[..., T], *args: Any
    ) -> "asyncio.Future[T]":
        job = _Job(future=self.create_future(), run=lambda: func(*args), context=contextvars.copy_context())
        if executor is None:
            self.call_soon(self._run_job, job, None, context=job.context)
            return job.future
        queue = self._threads.setdefault(executor, deque())
        queue.append(lambda: self._run_job(job, queue))
        if len(queue) == 1:
            self.call_soon(queue[0], context=job.context)
        return job.future

    def _run_job(self, job: "_Job", queue: deque[Callable[[], None]] | None) -> None:
        spending = _Spending()
        _spending.set(spending)
        result: Any = None
        error: Exception | None = None
        try:
            result = job.run()
        except Exception as raised:  # noqa: BLE001  # raised where the result is awaited
            error = raised

        def end() -> None:
            for effect in spending.effects:
                effect()
            if not job.future.cancelled():
                job.future.set_result(result) if error is None else job.future.set_exception(error)
            if queue is not None:
                queue.popleft()
                if queue:
                    self.call_soon(queue[0], context=job.context)

        self.call_later(spending.seconds * current_process().slowness, end, context=job.context)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(context["message"] if error is None else f"{context['message']}: {error!r}")

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """A call for a thread."""

    future: "asyncio.Future[Any]"
    run: Callable[[], Any]
    context: contextvars.Context


def _process_in(context: contextvars.Context | None) -> Process | None:
    return _process.get() if context is None else context.get(_process)
