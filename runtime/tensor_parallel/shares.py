"""A prompt's KV to one node, when every rank has some of its heads."""

import asyncio
from collections.abc import Callable, Sequence

from edgellm.runtime.kv.links import KvLinks
from edgellm.runtime.kv.push import KvPush
from edgellm.runtime.kv.transfer import TransferJob, total
from edgellm.runtime.kv.types import KvTarget, TransferStats
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.tasks import run_all
from edgellm.runtime.tensor_parallel.wire import error_from_proto, stats_from_proto, transfer_job_to_proto


class RankShare:
    """What one other rank sends; told to it by messages, and begun by the first of them."""

    def __init__(
        self, transfer_id: int, job: TransferJob, target: KvTarget, *, tell: Callable[[pb.LeaderMessage], None]
    ) -> None:
        self._id = transfer_id
        self._target = target
        self._tell = tell
        self._result: asyncio.Future[TransferStats] = asyncio.get_running_loop().create_future()
        self.is_over = False
        """Answered or stopped: nothing more is said about it."""
        tell(pb.LeaderMessage(transfer=transfer_job_to_proto(transfer_id, job, target)))

    async def result(self) -> TransferStats:
        """Raises TransferError."""
        return await self._result

    def advance(self, computed: int) -> None:
        if not self.is_over:
            self._tell(pb.LeaderMessage(advance=pb.RankAdvance(transfer_id=self._id, computed=computed)))

    def stop(self) -> None:
        if not self.is_over:
            self.is_over = True
            self._tell(pb.LeaderMessage(cancel=pb.RankCancel(transfer_id=self._id)))

    def sent(self, message: pb.RankSent) -> None:
        self.is_over = True
        if not self._result.done():
            self._result.set_result(stats_from_proto(message.transfer))

    def failed(self, message: pb.RankFailed) -> None:
        self.is_over = True
        if not self._result.done():
            self._result.set_exception(error_from_proto(message, self._target))


class GroupPush:
    """Rank 0's own push and the other ranks' shares, as one `Push`."""

    def __init__(self, own: KvPush, shares: Sequence[RankShare]) -> None:
        self._own = own
        self._shares = shares
        self._others: list[TransferStats] = []

    @property
    def target(self) -> KvTarget:
        return self._own.target

    @property
    def stats(self) -> TransferStats:
        return total([self._own.stats, *self._others])

    async def run(self, links: KvLinks) -> None:
        await run_all(self._own.run(links), *(self._wait_for(share) for share in self._shares))

    def advance(self, computed: int) -> None:
        self._own.advance(computed)
        for share in self._shares:
            share.advance(computed)

    def stop(self) -> None:
        self._own.stop()
        for share in self._shares:
            share.stop()

    async def _wait_for(self, share: RankShare) -> None:
        self._others.append(await share.result())
