"""What a node shows to Prometheus."""

import threading
from typing import Final, assert_never
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from edgellm.engines.kv import KvPool
from edgellm.runtime.config import NodeError
from edgellm.runtime.kv.copying.holder import CopyCounters
from edgellm.runtime.kv.copying.replicator import Replicator
from edgellm.runtime.kv.inbox import InboxCounters
from edgellm.runtime.lanes import DecodeLane, PlannedStep, PrefillLane, StageLane
from edgellm.runtime.messages import (
    CopyLost,
    Event,
    KvCopied,
    KvSent,
    PipelineBroken,
    PrefillDone,
    Released,
    RequestFailed,
    Resumed,
    Tokens,
)
from edgellm.runtime.node import Node

_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

_KIND: Final = {PrefillLane: "prefill", DecodeLane: "decode", StageLane: "stage"}


class NodeMetrics:
    """A registry of its own, so that several nodes can live in one process."""

    def __init__(self, node_id: str) -> None:
        self.registry = CollectorRegistry()
        self._http: tuple[WSGIServer, threading.Thread] | None = None
        info = Gauge("edgellm_node_info", "Which node this is", ["node_id"], registry=self.registry)
        info.labels(node_id).set(1)
        self._step_seconds = Histogram(
            "edgellm_step_seconds", "Engine steps", ["kind"], buckets=_STEP_SECONDS, registry=self.registry
        )
        self._stage_round_trip = Histogram(
            "edgellm_stage_round_trip_seconds",
            "From sending a step to a later stage to its result",
            buckets=_STEP_SECONDS,
            registry=self.registry,
        )
        self._steps_elsewhere = Gauge(
            "edgellm_steps_elsewhere", "Steps that began here and are on later stages", registry=self.registry
        )
        self._rows = Counter("edgellm_rows", "Tokens through the engines", ["kind"], registry=self.registry)
        self._tokens = Counter("edgellm_tokens_generated", "Tokens sampled", registry=self.registry)
        self._failed = Counter("edgellm_requests_failed", "Requests failed here", ["kind"], registry=self.registry)
        self._pipelines_broken = Counter(
            "edgellm_pipelines_broken", "Times that a next stage was lost", registry=self.registry
        )
        self._copies_lost = Counter("edgellm_kv_copies_lost", "Copies of KV given up", registry=self.registry)
        requests = Gauge("edgellm_requests", "Requests on this node", ["state"], registry=self.registry)
        self._running, self._waiting = requests.labels("running"), requests.labels("waiting")
        self._blocks_free = Gauge("edgellm_kv_blocks_free", "Free KV blocks", registry=self.registry)
        self._sent_bytes = Counter("edgellm_kv_sent_bytes", "KV sent", ["transport", "codec"], registry=self.registry)
        self._sent_ms = Counter(
            "edgellm_kv_sent_milliseconds",
            "Sending time, behind computing or after it",
            ["part"],
            registry=self.registry,
        )
        received = Gauge("edgellm_kv_received", "KV chunks by what became of them", ["state"], registry=self.registry)
        self._installed, self._stale = received.labels("installed"), received.labels("stale")
        self._corrupt, self._duplicate = received.labels("corrupt"), received.labels("duplicate")
        self._copies = Gauge("edgellm_kv_copies", "Copies of KV that this node keeps on others", registry=self.registry)
        self._copy_lag = Gauge(
            "edgellm_kv_copy_lag_tokens", "Tokens that the copy furthest behind lacks", registry=self.registry
        )
        copied = Gauge("edgellm_kv_copied_bytes", "Copies sent and received", ["way"], registry=self.registry)
        self._copied_to, self._copied_from = copied.labels("sent"), copied.labels("received")

    def serve(self, host: str, port: int | None) -> None:
        """Raises NodeError if the port cannot be had."""
        if port is None:
            return
        try:
            self._http = start_http_server(port, host.strip("[]"), self.registry)
        except (OSError, OverflowError) as error:
            raise NodeError(f"cannot serve metrics on {host} port {port}: {error}; choose another") from error

    def close(self) -> None:
        if self._http is not None:
            server, thread = self._http
            server.shutdown()
            server.server_close()
            thread.join()

    def step_ended(self, planned: PlannedStep, seconds: float) -> None:
        kind = _KIND[type(planned.lane)]
        self._step_seconds.labels(kind).observe(seconds)
        self._rows.labels(kind).inc(planned.step.rows)

    def stage_round_trip(self, seconds: float) -> None:
        self._stage_round_trip.observe(seconds)

    def event(self, event: Event) -> None:
        match event:
            case PrefillDone(first_token=first_token):
                self._tokens.inc(0 if first_token is None else 1)
            case Tokens(tokens=tokens):
                self._tokens.inc(len(tokens))
            case RequestFailed(kind=kind):
                self._failed.labels(kind).inc()
            case KvSent(stats=stats):
                self._sent_bytes.labels(stats.transport, stats.codec).inc(stats.bytes)
                self._sent_ms.labels("hidden").inc(stats.hidden_ms)
                self._sent_ms.labels("exposed").inc(stats.exposed_ms)
            case PipelineBroken():
                self._pipelines_broken.inc()
            case CopyLost():
                self._copies_lost.inc()
            case Released() | Resumed() | KvCopied():
                pass
            case _:
                assert_never(event)

    def observe(self, node: Node, pool: KvPool, received: InboxCounters) -> None:
        """Values that are read, not counted, at every heartbeat."""
        self._running.set(node.running)
        self._waiting.set(node.waiting)
        self._steps_elsewhere.set(node.lanes.steps_elsewhere)
        self._blocks_free.set(pool.free_blocks)
        self._installed.set(received.chunks)
        self._stale.set(received.stale)
        self._corrupt.set(received.corrupt)
        self._duplicate.set(received.duplicate)

    def observe_copies(self, sent: Replicator, received: CopyCounters) -> None:
        """Likewise."""
        self._copies.set(sent.running)
        self._copy_lag.set(sent.lag_tokens)
        self._copied_to.set(sent.sent_bytes)
        self._copied_from.set(received.bytes)
