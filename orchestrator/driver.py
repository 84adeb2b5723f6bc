"""The live shell of the core: gives it events and the time, carries its commands to streams and clients."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Literal, TypeAlias, assert_never, get_args

from edgellm.orchestrator.core import commands
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.events import Event, RequestEnded, RequestSubmitted, Tick
from edgellm.orchestrator.core.requests import Decoding, Prefilling, Queued, Recovering
from edgellm.orchestrator.core.values import ConnectionId, NodeState, RequestId, RequestSpec, Role
from edgellm.orchestrator.metrics import Metrics

logger = logging.getLogger(__name__)

TICK_S = 0.05

ClientEvent: TypeAlias = commands.AcceptRequest | commands.RejectRequest | commands.EmitToken | commands.FinishRequest
NodeOutbox: TypeAlias = "asyncio.Queue[commands.NodeCommand]"
ClientInbox: TypeAlias = "asyncio.Queue[ClientEvent]"


class Driver:
    """Owns the core. All methods must be called on one event loop; `post` never waits."""

    def __init__(self, core: Core, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.core = core
        self.metrics = metrics
        self.clock = clock
        """Seconds, never backwards."""
        self._outboxes: dict[ConnectionId, NodeOutbox] = {}
        self._inboxes: dict[RequestId, ClientInbox] = {}
        self._last_connection = 0
        self.changed = asyncio.Event()
        """Set, and replaced, whenever a node changes its state."""

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

    def submit(self, spec: RequestSpec) -> ClientInbox:
        """Hand a request in. Its acceptance or rejection is in the inbox at once; a finish will be the last event."""
        inbox: ClientInbox = asyncio.Queue()
        if spec.request_id in self._inboxes:
            message = f"request id {spec.request_id!r} is in use: choose another, or leave it empty"
            inbox.put_nowait(commands.RejectRequest(request_id=spec.request_id, kind="duplicate", message=message))
            return inbox
        self._inboxes[spec.request_id] = inbox
        self.post(RequestSubmitted(spec=spec))
        return inbox

    def end(self, spec: RequestSpec, inbox: ClientInbox, reason: Literal["cancelled", "stop"]) -> None:
        """End the request behind `inbox`. Without effect if it has ended: its id may belong to another one by now."""
        if self._inboxes.get(spec.request_id) is inbox:
            self.post(RequestEnded(request_id=spec.request_id, reason=reason))

    def post(self, event: Event) -> None:
        for command in self.core.handle(self.clock(), event):
            self._carry_out(command)

    async def run_ticks(self) -> None:
        """Let time go on, until cancelled."""
        while True:
            self.post(Tick())
            self._refresh_gauges()
            await asyncio.sleep(TICK_S)

    def _carry_out(self, command: commands.Command) -> None:
        match command:
            case (
                commands.WelcomeNode()
                | commands.RefuseNode()
                | commands.DropNode()
                | commands.StartPrefill()
                | commands.StartDecode()
                | commands.HoldCopies()
                | commands.ProtectAttempt()
                | commands.ReleaseAttempt()
            ):
                outbox = self._outboxes.get(command.connection)
                if outbox is not None:
                    outbox.put_nowait(command)
            case commands.AcceptRequest() | commands.EmitToken():
                self._inboxes[command.request_id].put_nowait(command)
            case commands.RejectRequest():
                self.metrics.rejected.labels(command.kind).inc()
                self._inboxes.pop(command.request_id).put_nowait(command)
            case commands.FinishRequest():
                self.metrics.observe_finished(command.reason, command.stats)
                self._inboxes.pop(command.request_id).put_nowait(command)
            case commands.NoteRequest():
                logger.info(
                    "request=%s epoch=%d state=%s %s", command.request_id, command.epoch, command.state, command.detail
                )
            case commands.NoteNode():
                self._note_node(command)
            case commands.NoteTakeover():
                self._note_takeover(command)
            case _:
                assert_never(command)

    def _note_node(self, note: commands.NoteNode) -> None:
        logger.info("node=%s incarnation=%d state=%s %s", note.node_id, note.incarnation, note.state, note.detail)
        self.changed.set()
        self.changed = asyncio.Event()

    def _note_takeover(self, note: commands.NoteTakeover) -> None:
        logger.warning(
            "node=%s restored=%d begun_again=%d %s", note.node_id, note.restored, note.begun_again, note.detail
        )
        self.metrics.takeovers.labels("restored").inc(note.restored)
        self.metrics.takeovers.labels("begun again").inc(note.begun_again)

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
            self.metrics.in_state.labels(state).set(count)
        nodes = Counter((node.profile.role, node.state) for node in self.core.state.nodes)
        for role, node_state in product(get_args(Role), get_args(NodeState)):
            self.metrics.nodes.labels(role, node_state).set(nodes[role, node_state])
