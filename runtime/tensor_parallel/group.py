"""The other ranks of a tensor-parallel engine, as rank 0 sees them; their streams are the servicer's."""

import asyncio
import itertools

from edgellm.engines.base import Batch
from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeError
from edgellm.runtime.kv.push import KvPush
from edgellm.runtime.kv.transfer import TransferJob
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.tasks import race
from edgellm.runtime.tensor_parallel.patience import Patience, Silence
from edgellm.runtime.tensor_parallel.shares import GroupPush, RankShare
from edgellm.runtime.tensor_parallel.wire import step_to_proto


class Peer:
    """One other rank."""

    def __init__(self, rank: int, patience: Patience) -> None:
        self.rank = rank
        self.outgoing: asyncio.Queue[pb.LeaderMessage] = asyncio.Queue()
        self.silence = Silence(f"tensor-parallel rank {rank}", patience)
        self.ready = asyncio.Event()
        self._shares: dict[int, RankShare] = {}

    def share(self, transfer_id: int, job: TransferJob, push: KvPush) -> RankShare:
        self._shares = {number: share for number, share in self._shares.items() if not share.is_over}
        self._shares[transfer_id] = share = RankShare(transfer_id, job, push.target, tell=self.outgoing.put_nowait)
        return share

    def handle(self, message: pb.RankMessage) -> None:
        """Raises NodeError for what a rank does not say at this point."""
        self.silence.heard()
        match message.WhichOneof("message"):
            case "beat":
                return
            case "ready":
                self.silence.works()
                self.ready.set()
            case "sent":
                if share := self._shares.get(message.sent.transfer_id):
                    share.sent(message.sent)
            case "failed":
                if share := self._shares.get(message.failed.transfer_id):
                    share.failed(message.failed)
            case kind:
                raise NodeError(f"tensor-parallel rank {self.rank} sent {kind!r}; is it another version?")


class RankGroup:
    """All other ranks. A step or a transfer is told to each of them in the order in which it is called here."""

    def __init__(self, spec: EngineSpec, bundle_sha256: str, welcome: pb.RankWelcome, patience: Patience) -> None:
        self.world = spec.world
        self.welcome = welcome
        self._spec = spec
        self._bundle_sha256 = bundle_sha256
        self._patience = patience
        self._peers: dict[int, Peer] = {}
        self._complete = asyncio.Event()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transfer_ids = itertools.count(1)

    # Coming and going

    def refusal(self, hello: pb.RankHello) -> str | None:
        """Why a rank cannot be part of this group."""
        if hello.bundle_sha256 != self._bundle_sha256:
            return f"rank {hello.rank} has another bundle than rank 0; copy one bundle to all of them"
        if hello.world != self.world or not 0 < hello.rank < self.world:
            return f"rank {hello.rank} of {hello.world} is not one of the other ranks of {self._spec.name}"
        return None

    def join(self, rank: int) -> Peer | None:
        """None while that rank's last process is not known to be gone."""
        if rank in self._peers:
            return None
        self._peers[rank] = peer = Peer(rank, self._patience)
        peer.outgoing.put_nowait(pb.LeaderMessage(welcome=self.welcome))
        if len(self._peers) == self.world - 1:
            self._complete.set()
        return peer

    def leave(self, rank: int) -> None:
        """A rank's stream has ended: so does this node."""
        self.crashed(NodeError(f"tensor-parallel rank {rank} of {self.world} has gone; all ranks must start again"))

    def crashed(self, error: BaseException) -> None:
        """`watch` raises the first of these."""
        if not self._lost.done():
            self._lost.set_exception(error)

    async def wait_until_complete(self, timeout_s: float) -> None:
        """Raises NodeError if a rank does not come."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._complete.wait()
        except TimeoutError as error:
            missing = [rank for rank in range(1, self.world) if rank not in self._peers]
            raise NodeError(
                f"rank {missing[0]} of {self.world} did not come within {timeout_s:g} s; start edgellm-node --engine "
                f"{self._spec.name.replace('tp0', f'tp{missing[0]}')} with the same --tp-leader"
            ) from error

    async def wait_until_ready(self) -> None:
        """All ranks have loaded their engine; as long as they say that they live, they may take their time."""
        for peer in self._peers.values():
            await peer.ready.wait()

    async def watch(self) -> None:
        """Until cancelled. Raises NodeError when a rank has gone, or is silent."""
        await race(self._beat(), self._until_lost())

    async def dismiss(self) -> None:
        """Tell the other ranks to exit, within a second; from now on nobody is missed."""
        self._lost.cancel()
        self._tell(pb.LeaderMessage(stop=pb.RankStop()))
        for peer in self._peers.values():
            try:
                async with asyncio.timeout(1.0):
                    await peer.outgoing.join()
            except TimeoutError:
                return

    # Work

    def step(self, batch: Batch) -> None:
        self._tell(pb.LeaderMessage(step=step_to_proto(batch)))

    def share(self, own: KvPush, job: TransferJob) -> GroupPush:
        """The push of all ranks' KV to the target of rank 0's."""
        transfer_id = next(self._transfer_ids)
        return GroupPush(own, [peer.share(transfer_id, job, own) for peer in self._peers.values()])

    # Inside

    def _tell(self, message: pb.LeaderMessage) -> None:
        for peer in self._peers.values():
            peer.outgoing.put_nowait(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._patience.beat_s)
            self._tell(pb.LeaderMessage(beat=pb.RankBeat()))
            for peer in self._peers.values():
                peer.silence.beat()

    async def _until_lost(self) -> None:
        await asyncio.shield(self._lost)
