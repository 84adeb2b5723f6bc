"""How attempts come and go on a node: admitted, stalled, taken over, failed, ended, and released. Pure."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from edgellm.runtime.answers import Answers
from edgellm.runtime.attempts import Attempts
from edgellm.runtime.checks import RefusedError
from edgellm.runtime.kv.copying.holder import Admission
from edgellm.runtime.kv.copying.holdings import Holdings
from edgellm.runtime.kv.ledger import BlockLedger
from edgellm.runtime.kv.transfer import Arrivals, Copies, Transfers
from edgellm.runtime.kv.types import Attempt, NodeId
from edgellm.runtime.lanes import Lanes
from edgellm.runtime.messages import Event, FailureKind, Released, RequestFailed
from edgellm.runtime.readings import Readings
from edgellm.runtime.stages.messages import StageLinks

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Exchanges:
    """What a node reaches other nodes by."""

    transfers: Transfers
    arrivals: Arrivals
    copies: Copies
    links: StageLinks


@dataclass(kw_only=True, eq=False)
class Lifecycle:
    """Whoever may know of an attempt is here, so that dropping one misses none of them."""

    attempts: Attempts
    readings: Readings
    answers: Answers
    lanes: Lanes
    ledger: BlockLedger
    holdings: Holdings
    emit: Callable[[Event], None]
    wake: Callable[[], None]
    lease_s: float
    """How long KV is kept for somebody who decides what becomes of it."""
    exchanges: Exchanges = field(init=False)
    """Set before the first command."""

    def admit(self, attempt: Attempt) -> bool:
        """Whether an attempt may take room here; older epochs of its request lose theirs."""
        if not self.attempts.admits(attempt):
            return False
        live = self.attempts.live(attempt.request_id)
        if live is not None and live != attempt:
            self.drop(live)
        self.attempts.enter(attempt)
        return True

    def admit_copy(self, attempt: Attempt) -> Admission:
        """Like `admit`, but an older epoch is not dropped: its copies may become the newer one's."""
        live = self.attempts.live(attempt.request_id)
        if live != attempt and not self.attempts.is_counted:
            return "early"
        if not self.attempts.admits(attempt):
            return "stale"
        if live is not None and live != attempt:
            return "early"
        self.attempts.enter(attempt)
        return "admitted"

    def admit_command(self, attempt: Attempt, *, is_known: bool, resume_from: Attempt | None = None) -> bool:
        """An attempt that resumes takes over what would else be dropped for it."""
        if is_known or not (self.attempts.admits(attempt) if resume_from else self.admit(attempt)):
            _log.info("command ignored %s reason=%s", attempt, "repeated" if is_known else "stale")
            return False
        return True

    def take_over(self, attempt: Attempt, old: Attempt, tokens: int) -> None:
        """KV of an older attempt becomes this one's. Raises RefusedError if there is none."""
        if not self.attempts.is_live(old) or old not in self.ledger:
            self.admit(attempt)
            raise RefusedError("transfer", f"KV of {old} is not here")
        self._detach(old)
        self.holdings.rename(old, attempt, tokens)
        self.attempts.enter(attempt)
        _log.info("took over %s from_epoch=%d tokens=%d", attempt, old.epoch, tokens)

    def release(self, attempt: Attempt) -> None:
        """Forget it and older ones of its request; answered when their blocks are free."""
        live = self.attempts.live(attempt.request_id)
        self.attempts.release(attempt)
        if live is not None and live.epoch <= attempt.epoch:
            _log.info("released %s", live)
            self.drop(live)
        self.answer_releases()

    def let_go(self, attempt: Attempt) -> None:
        """Nothing of it is needed here any more. Copies of it may come back, so it is not stale."""
        self.drop(attempt)
        self.attempts.tell_when_free(attempt)
        self.answer_releases()

    def drop_everything(self) -> None:
        """Nobody will ask for anything of it."""
        for attempt in self.attempts:
            self.drop(attempt)
        self.attempts.orchestrator_lost()

    def orchestrator_lost(self, now_s: float) -> None:
        """Answers stall, and what has KV waits for another orchestrator; the rest is of no use to it."""
        with_kv = {held.attempt for held in self.holdings.held()}
        for attempt in self.attempts:
            if attempt in with_kv and not self.answers.is_waiting(attempt):
                self.stall(attempt, now_s)
            else:
                self.drop(attempt)
        self.attempts.orchestrator_lost()

    def expire(self, now_s: float) -> None:
        """Fail requests whose KV did not arrive in time, and let go of what nobody decided about."""
        for decode in self.answers.late(now_s):
            message = f"the prompt's KV did not arrive within {decode.kv_timeout_s} s"
            self.fail(decode.attempt, "transfer", message)
        self._lease_copies(now_s)
        for attempt in self.attempts.undecided(now_s):
            if attempt in self.answers:
                self.fail(attempt, "transfer", f"it stalled, and nobody resumed it within {self.lease_s} s")
            else:
                self.let_go(attempt)

    @contextmanager
    def failing(self, attempt: Attempt) -> Iterator[None]:
        """A refusal inside fails the attempt."""
        try:
            yield
        except RefusedError as refusal:
            self.fail(attempt, refusal.kind, str(refusal))

    def fail(self, attempt: Attempt, kind: FailureKind, message: str, peer: NodeId | None = None) -> None:
        _log.warning("failed %s kind=%s message=%s", attempt, kind, message)
        self.emit(RequestFailed(attempt=attempt, kind=kind, message=message, peer=peer))
        self.end(attempt)

    def fail_live(self, attempts: Sequence[Attempt], message: str) -> None:
        """The engine refused a step; some of its attempts may have gone meanwhile."""
        for attempt in attempts:
            if self.attempts.is_live(attempt):
                self.fail(attempt, "engine", message)

    def stall(self, attempt: Attempt, now_s: float) -> None:
        """Keep what there is of it, for somebody who resumes or releases it."""
        self.answers.stall(attempt)
        self.attempts.await_decision(attempt, now_s + self.lease_s)

    def end(self, attempt: Attempt) -> None:
        """Nothing more of this attempt is wanted here."""
        self.attempts.fence.close(attempt)
        self.drop(attempt)

    def drop(self, attempt: Attempt) -> None:
        """Take the attempt out of everything that may hold it; its blocks are free when no step uses them."""
        self._detach(attempt)
        self.forget_kv(attempt)
        self.start_readings()

    def forget_kv(self, attempt: Attempt) -> None:
        """Whatever is here of it, or arriving."""
        self.exchanges.arrivals.forget(attempt)
        self.holdings.drop(attempt)
        self.ledger.drop(attempt)

    def answer_releases(self) -> None:
        """Tell once no block of the request is held any more, by this epoch or an older one."""
        for attempt in self.attempts.answered(self.ledger.attempts):
            self.emit(Released(attempt=attempt))

    def start_readings(self) -> None:
        """Blocks may have become free."""
        self.readings.start_fitting()
        self.wake()

    def _lease_copies(self, now_s: float) -> None:
        """Copies that nobody adds to or takes over are kept for the lease."""
        for attempt in self.holdings.take_fed():
            if attempt not in self.answers:
                self.attempts.await_decision(attempt, now_s + self.lease_s)

    def _detach(self, attempt: Attempt) -> None:
        """Out of everything but its KV."""
        self.attempts.leave(attempt)
        self.readings.drop(attempt)
        self.answers.drop(attempt)
        self.exchanges.transfers.cancel(attempt)
        self.exchanges.copies.stop(attempt)
        self.lanes.remove(attempt)
