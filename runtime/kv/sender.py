"""All prompts whose KV this node is sending."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from edgellm.engines.kv import KvContract, KvPool
from edgellm.runtime.kv.codecs import CodecChoice
from edgellm.runtime.kv.links import KvLink, KvLinks
from edgellm.runtime.kv.push import KvPush
from edgellm.runtime.kv.sending_clock import SendingClock
from edgellm.runtime.kv.transfer import TransferError, TransferJob, total
from edgellm.runtime.kv.types import Attempt, KvTarget, TransferStats
from edgellm.runtime.tasks import run_all


def choose_codec(choice: CodecChoice, contract: KvContract, link: KvLink, prefill_tokens_per_s: float) -> str:
    """`auto` is `raw` unless the link was measured to be slower than this node fills it; then `int8`.

    A codec that the receiver or the contract does not have becomes `raw`: fewer bytes are a wish, not a need.
    """
    wanted: str = choice
    if choice == "auto":
        needed = prefill_tokens_per_s * contract.bytes_per_token
        is_exposed = link.outgoing.name != "shm" and link.bytes_per_s is not None and link.bytes_per_s < needed
        wanted = "int8" if is_exposed else "raw"
    return wanted if wanted in link.codecs else "raw"


class Push(Protocol):
    """A prompt's KV to one target, by all who send some of it."""

    @property
    def target(self) -> KvTarget: ...

    @property
    def stats(self) -> TransferStats: ...

    async def run(self, links: KvLinks) -> None:
        """Send everything. Raises TransferError."""
        ...

    def advance(self, computed: int) -> None: ...

    def stop(self) -> None:
        """From now on no block is read. No effect after the end."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranks:
    """The tensor-parallel ranks that send KV together."""

    world: int
    join: Callable[[KvPush, TransferJob], Push]
    """This rank's push and what the other ranks send to the same target, as one."""


ALONE: Final = Ranks(world=1, join=lambda push, _: push)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sending:
    pushes: tuple[Push, ...]
    task: asyncio.Task[None]


@dataclass(frozen=True, kw_only=True, eq=False)
class SenderHooks:
    """Who is told how a transfer ended; but for the last, not called for cancelled ones."""

    on_sent: Callable[[Attempt, TransferStats], None]
    """Every target but backups has everything; not called where all are backups."""
    on_backup_lost: Callable[[Attempt, KvTarget, TransferError], None]
    on_over: Callable[[Attempt], None]
    """Nothing is being sent any more, and nothing failed but backups."""
    on_failed: Callable[[Attempt, TransferError], None]
    on_crash: Callable[[BaseException], None]
    """Given what nobody expected."""


class KvSender:
    """Starts, feeds and cancels transfers, and owns their tasks until `close`."""

    def __init__(
        self,
        *,
        pool: KvPool,
        links: KvLinks,
        codec: CodecChoice,
        prefill_tokens_per_s: Callable[[], float],
        hooks: SenderHooks,
        now_s: Callable[[], float],
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self._pool = pool
        self._links = links
        self._codec = codec
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._hooks = hooks
        self._now_s = now_s
        self._sending: dict[Attempt, _Sending] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, job: TransferJob) -> None:
        """Open streams to all targets; chunks follow `advance`."""
        pushes = tuple(self._ranks.join(self._make_push(job, target), job) for target in job.targets)
        task = asyncio.create_task(self._run(job.attempt, pushes))
        self._sending[job.attempt] = _Sending(pushes=pushes, task=task)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def advance(self, attempt: Attempt, computed: int) -> None:
        """KV of the first `computed` prompt tokens is in the pool. No effect if nothing is being sent."""
        if sending := self._sending.get(attempt):
            for push in sending.pushes:
                push.advance(computed)

    def cancel(self, attempt: Attempt) -> None:
        """From now on the attempt's blocks are not read. No effect if nothing is being sent."""
        if sending := self._sending.pop(attempt, None):
            _stop(sending.pushes)
            sending.task.cancel()

    async def close(self) -> None:
        """Cancel everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_push(self, job: TransferJob, target: KvTarget) -> KvPush:
        return KvPush(
            job,
            target,
            pool=self._pool,
            codec=self._codec_for,
            clock=SendingClock(self._now_s),
            senders=self._ranks.world,
        )

    async def _run(self, attempt: Attempt, pushes: tuple[Push, ...]) -> None:
        needed = tuple(push for push in pushes if not push.target.backup)
        backups = asyncio.gather(*(self._back_up(attempt, push) for push in pushes if push.target.backup))
        try:
            if needed:
                await run_all(*(push.run(self._links) for push in needed))
                self._hooks.on_sent(attempt, total([push.stats for push in needed]))
            await backups
        except TransferError as error:
            _stop(pushes)
            backups.cancel()
            self._sending.pop(attempt, None)
            self._hooks.on_failed(attempt, error)
        else:
            self._sending.pop(attempt, None)
            self._hooks.on_over(attempt)
        finally:
            backups.cancel()
            await asyncio.gather(backups, return_exceptions=True)

    async def _back_up(self, attempt: Attempt, push: Push) -> None:
        """A backup that fails costs protection, and nothing else."""
        try:
            await push.run(self._links)
        except TransferError as error:
            push.stop()
            self._hooks.on_backup_lost(attempt, push.target, error)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._hooks.on_crash(error)

    def _codec_for(self, link: KvLink) -> str:
        return choose_codec(self._codec, self._pool.contract, link, self._prefill_tokens_per_s())


def _stop(pushes: Sequence[Push]) -> None:
    for push in pushes:
        push.stop()
