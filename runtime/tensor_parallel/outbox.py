"""What a rank other than 0 sends of prompts' KV: its heads, wherever rank 0 sends its own."""

import asyncio
import time
from collections.abc import Callable

from edgellm.engines.base import Engine
from edgellm.engines.kv import KvContract
from edgellm.runtime.config import NodeConfig
from edgellm.runtime.host import host_id
from edgellm.runtime.kv.links import KvLink, KvLinks, LinkConfig
from edgellm.runtime.kv.push import KvPush
from edgellm.runtime.kv.sender import choose_codec
from edgellm.runtime.kv.sending_clock import SendingClock
from edgellm.runtime.kv.transfer import TransferError
from edgellm.runtime.rpc import tensor_parallel_pb2 as pb
from edgellm.runtime.tensor_parallel.wire import failed_to_proto, sent_to_proto, transfer_job_from_proto


class Outbox:
    """Pushes by the number that rank 0 gave them. Each is answered once, unless it is cancelled."""

    def __init__(
        self,
        config: NodeConfig,
        engine: Engine,
        contract: KvContract,
        *,
        answer: Callable[[pb.RankMessage], None],
        on_crash: Callable[[BaseException], None],
    ) -> None:
        self._config = config
        self._engine = engine
        self._answer = answer
        self._on_crash = on_crash
        links = LinkConfig(node_id=config.node_id, host_id=host_id(), allow_shm=config.allow_shm)
        self._links = KvLinks(links, contract)
        self._pushes: dict[int, KvPush] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._rows = 0
        self._seconds = 0.0

    def transfer(self, order: pb.RankTransfer) -> None:
        job = transfer_job_from_proto(order)
        push = KvPush(
            job,
            job.targets[0],
            pool=self._engine.kv,
            codec=self._codec_for,
            clock=SendingClock(time.monotonic),
            senders=self._engine.spec.world,
        )
        self._pushes[order.transfer_id] = push
        task = asyncio.create_task(self._run(order.transfer_id, push))
        self._tasks[order.transfer_id] = task
        task.add_done_callback(lambda _: self._ended(order.transfer_id, task))

    def advance(self, order: pb.RankAdvance) -> None:
        if push := self._pushes.get(order.transfer_id):
            push.advance(order.computed)

    def cancel(self, order: pb.RankCancel) -> None:
        """No block of it is read any more."""
        if push := self._pushes.get(order.transfer_id):
            push.stop()
            self._tasks[order.transfer_id].cancel()

    def step_ended(self, rows: int, seconds: float) -> None:
        """How fast prompts are read decides how fast KV must travel."""
        self._rows += rows
        self._seconds += seconds

    async def close(self) -> None:
        """Cancel everything, and close the links."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._links.close()

    async def _run(self, transfer_id: int, push: KvPush) -> None:
        try:
            await push.run(self._links)
        except TransferError as error:
            self._answer(failed_to_proto(transfer_id, error))
        else:
            self._answer(sent_to_proto(transfer_id, push.stats))

    def _ended(self, transfer_id: int, task: asyncio.Task[None]) -> None:
        del self._pushes[transfer_id], self._tasks[transfer_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_crash(error)

    def _codec_for(self, link: KvLink) -> str:
        tokens_per_s = self._rows / self._seconds if self._seconds else 0.0
        return choose_codec(self._config.kv_codec, self._engine.kv.contract, link, tokens_per_s)
