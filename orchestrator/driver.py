"""The live shell of the core: gives it events and the time, carries its commands to streams and clients."""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import Event, RequestsRecovered, RequestSubmitted, Tick
from edgellm.orchestrator.core.protection import copy_lag_tokens
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Queued, Recovering
from edgellm.orchestrator.core.values import ConnectionId, RecoveredRequest, RequestId
from edgellm.orchestrator.journal import Accepted, Emitted, Ended, Entry, EpochsReserved, Placed
from edgellm.orchestrator.journal_writer import Journal
from edgellm.orchestrator.metrics import Metrics

logger = logging.getLogger(__name__)

TICK_S = 0.05

EPOCHS_RESERVED = 4096
"""At a time, when half of those before are used: the journal has them long before an attempt does."""

HISTORY = 50
"""Things that happened to nodes and are remembered for `status`."""

ClientEvent: TypeAlias = commands.AcceptRequest | commands.RejectRequest | commands.EmitToken | commands.FinishRequest
NodeOutbox: TypeAlias = "asyncio.Queue[commands.NodeCommand]"
ClientSink: TypeAlias = Callable[[ClientEvent], None]


@dataclass(frozen=True, kw_only=True)
class Happening:
    """Something that happened in the cluster, on the driver's clock."""

    time_s: float
    text: str


class Driver:
    """Owns the core. All methods must be called on one event loop; `post` never waits.

    Where there is a journal, a client hears of nothing before it is in there. Nodes are told at once: what they do for
    a request that the journal has not seen is undone after a restart.
    """

    def __init__(
        self, core: Core, metrics: Metrics, clock: Callable[[], float], journal: Journal | None = None
    ) -> None:
        self.core = core
        self.metrics = metrics
        self.clock = clock
        """Seconds, never backwards."""
        self._journal = journal
        self._outboxes: dict[ConnectionId, NodeOutbox] = {}
        self._sinks: dict[RequestId, ClientSink] = {}
        self._highest_reserved = 0
        self._last_connection = 0
        self.changed = asyncio.Event()
        """Set, and replaced, whenever a node changes its state."""
        self.history: deque[Happening] = deque(maxlen=HISTORY)

    def open_connection(self) -> tuple[ConnectionId, NodeOutbox]:
        """For a stream that is about to say hello: its id, and the commands it has to carry."""
        self._last_connection += 1
        connection = ConnectionId(self._last_connection)
        outbox: NodeOutbox = asyncio.Queue()
        self._outboxes[connection] = outbox
        return connection, outbox

    def close_connection(self, connection: ConnectionId) -> None:
        """Commands to this stream go nowhere from now on."""
        del self._outboxes[connection]

    def submit(self, accepted: Accepted, sink: ClientSink) -> None:
        """Hand a request in. `sink` gets its acceptance or rejection first, and its finish last."""
        spec = accepted.spec
        if spec.request_id in self._sinks:
            message = f"request id {spec.request_id!r} is in use: choose another, or leave it empty"
            sink(commands.RejectRequest(request_id=spec.request_id, kind="duplicate", message=message))
            return
        self._sinks[spec.request_id] = sink
        self._do(RequestSubmitted(spec=spec), (accepted,))

    def recover(self, requests: Sequence[RecoveredRequest], sinks: Mapping[RequestId, ClientSink]) -> None:
        """Go on with what an earlier orchestrator left; before anything else."""
        self._sinks.update(sinks)
        self.post(RequestsRecovered(requests=tuple(requests)))

    def post(self, event: Event) -> None:
        self._do(event, ())

    def _do(self, event: Event, entries: Sequence[Entry]) -> None:
        to_clients = []
        for command in self.core.handle(self.clock(), event):
            match command:
                case (
                    commands.AcceptRequest()
                    | commands.EmitToken()
                    | commands.FinishRequest()
                    | commands.RejectRequest()
                ):
                    to_clients.append(command)
                case _:
                    self._carry_out(command)
                    entries = (*entries, *_placement(command))
        self._tell_clients(to_clients, entries)

    def _tell_clients(self, events: Sequence[ClientEvent], entries: Sequence[Entry]) -> None:
        rejected = any(isinstance(event, commands.RejectRequest) for event in events)
        entries = [] if rejected else [*entries, *(entry for event in events for entry in _entry(event))]
        entries += self._reserve_epochs()
        if self._journal is None or not entries:
            self._deliver(events)
        else:
            self._journal.record(entries, lambda: self._deliver(events))

    def _reserve_epochs(self) -> Sequence[Entry]:
        epoch = self.core.state.epoch
        if epoch + EPOCHS_RESERVED // 2 < self._highest_reserved:
            return ()
        self._highest_reserved = epoch + EPOCHS_RESERVED
        return (EpochsReserved(highest=self._highest_reserved),)

    def _deliver(self, events: Sequence[ClientEvent]) -> None:
        for event in events:
            match event:
                case commands.RejectRequest():
                    self.metrics.rejected.labels(event.kind).inc()
                    self._sinks.pop(event.request_id)(event)
                case commands.FinishRequest():
                    self.metrics.observe_finished(event.reason, event.stats)
                    self._sinks.pop(event.request_id)(event)
                case commands.AcceptRequest() | commands.EmitToken():
                    self._sinks[event.request_id](event)
                case _:
                    assert_never(event)

    async def run_ticks(self) -> None:
        """Let time go on, until cancelled."""
        while True:
            self.post(Tick())
            self._refresh_gauges()
            await asyncio.sleep(TICK_S)

    def _carry_out(self, command: commands.NodeCommand | commands.Note) -> None:
        match command:
            case commands.NoteRequest():
                logger.info(
                    "request=%s epoch=%d state=%s %s", command.request_id, command.epoch, command.state, command.detail
                )
            case commands.NoteNode():
                self._note_node(command)
            case commands.NoteTakeover():
                self._note_takeover(command)
            case _:
                outbox = self._outboxes.get(command.connection)
                if outbox is not None:
                    outbox.put_nowait(command)

    def _note_node(self, note: commands.NoteNode) -> None:
        logger.info("node=%s incarnation=%d state=%s %s", note.node_id, note.incarnation, note.state, note.detail)
        self._remember(f"{note.node_id} #{note.incarnation} {note.state}: {note.detail}")
        self.changed.set()
        self.changed = asyncio.Event()

    def _note_takeover(self, note: commands.NoteTakeover) -> None:
        logger.warning(
            "node=%s restored=%d begun_again=%d %s", note.node_id, note.restored, note.begun_again, note.detail
        )
        self._remember(
            f"without {note.node_id}: {note.restored} requests go on from copies, {note.begun_again} begin again"
        )
        self.metrics.takeovers.labels("restored").inc(note.restored)
        self.metrics.takeovers.labels("begun again").inc(note.begun_again)

    def _remember(self, text: str) -> None:
        self.history.append(Happening(time_s=self.clock(), text=text))

    def request_counts(self) -> dict[str, int]:
        """Requests under way by state: queued, prefilling, decoding."""
        counts = {"queued": 0, "prefilling": 0, "decoding": 0}
        for request in self.core.state.requests.values():
            match request.phase:
                case Queued() | Recovering():
                    counts["queued"] += 1
                case Prefilling():
                    counts["prefilling"] += 1
                case Decoding():
                    counts["decoding"] += 1
        return counts

    def _refresh_gauges(self) -> None:
        for state, count in self.request_counts().items():
            self.metrics.in_state[state].set(count)
        nodes = Counter((node.profile.role, node.state) for node in self.core.state.nodes)
        for role_and_state, gauge in self.metrics.nodes.items():
            gauge.set(nodes[role_and_state])
        for node in self.core.state.nodes:
            lag = copy_lag_tokens(self.core.state, node.connection)
            self.metrics.copy_lag.labels(node.profile.node_id).set(lag)


def _placement(command: commands.NodeCommand | commands.Note) -> Sequence[Entry]:
    if not isinstance(command, commands.StartDecode):
        return ()
    nodes = frozenset(stage.node_id for stage in command.stages)
    return (Placed(request_id=command.attempt.request_id, nodes=nodes),)


def _entry(event: ClientEvent) -> Sequence[Entry]:
    match event:
        case commands.EmitToken(request_id=request_id, token=token):
            return (Emitted(request_id=request_id, token=token),)
        case commands.FinishRequest():
            return (
                Ended(
                    request_id=event.request_id,
                    reason=event.reason,
                    message=event.message,
                    stats=event.stats,
                    unix_s=time.time(),
                ),
            )
        case _:
            return ()
