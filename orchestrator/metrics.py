"""Prometheus metrics of the orchestrator, fed from the core's commands."""

from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from edgellm.orchestrator.core.values import FinishReason, NodeState, RequestStats, Role

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_MILLISECONDS = (0.0, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 1000)


class Metrics:
    """One set of metrics in its own registry, so that several orchestrators can live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.ttft = Histogram("edgellm_ttft_seconds", "Time to first token", buckets=_SECONDS, registry=registry)
        self.tpot = Histogram("edgellm_tpot_seconds", "Time per later token", buckets=_SECONDS, registry=registry)
        self.queue = Histogram("edgellm_queue_seconds", "Time until first placed", buckets=_SECONDS, registry=registry)
        self.exposed = Histogram(
            "edgellm_kv_exposed_milliseconds", "KV sending not hidden", buckets=_MILLISECONDS, registry=registry
        )
        self.recovery = Histogram(
            "edgellm_recovery_seconds",
            "Last sign of a lost device to the next token, and its parts",
            ["part"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.takeovers = Counter("edgellm_takeovers", "Requests that went on after a loss", ["way"], registry=registry)
        self.copy_lag = Gauge(
            "edgellm_copy_lag_tokens", "Tokens by which the copies of a node's KV lag", ["node"], registry=registry
        )
        self.requests = Counter("edgellm_requests", "Ended requests", ["outcome", "prefill_path"], registry=registry)
        self.rejected = Counter("edgellm_rejected", "Refused requests", ["kind"], registry=registry)
        self.tokens = Counter("edgellm_tokens", "Generated tokens", registry=registry)
        self.kv_bytes = Counter("edgellm_kv_bytes", "KV bytes sent", ["transport", "codec"], registry=registry)
        in_state = Gauge("edgellm_requests_in_state", "Requests under way", ["state"], registry=registry)
        self.in_state = {state: in_state.labels(state) for state in ("queued", "prefilling", "decoding")}
        nodes = Gauge("edgellm_nodes", "Nodes", ["role", "state"], registry=registry)
        self.nodes = {of: nodes.labels(*of) for of in product(get_args(Role), get_args(NodeState))}

    def observe_finished(self, reason: FinishReason, stats: RequestStats) -> None:
        self.requests.labels(reason, stats.prefill_path or "none").inc()
        self.tokens.inc(stats.generated_tokens)
        self.queue.observe(stats.queue_ms / 1e3)
        if stats.generated_tokens > 0:
            self.ttft.observe(stats.ttft_ms / 1e3)
        if stats.generated_tokens > 1:
            self.tpot.observe(stats.tpot_ms / 1e3)
        if stats.takeovers > 0:
            for part in ("total", "detect", "fence", "restore", "first_token"):
                self.recovery.labels(part).observe(getattr(stats.recovery, f"{part}_ms") / 1e3)
        if stats.kv.transport:
            self.exposed.observe(stats.kv.exposed_ms)
            self.kv_bytes.labels(stats.kv.transport, stats.kv.codec).inc(stats.kv.bytes)
