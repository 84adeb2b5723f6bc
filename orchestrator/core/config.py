"""Bounds and facts the core works with."""

from dataclasses import dataclass

from edgellm.orchestrator.core.values import Layers


class CoreConfigError(ValueError):
    """A value of the configuration makes no sense; the message names it."""


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """Facts of the served bundle, and every bound on waiting."""

    bundle_sha256: str
    kv_contract_sha256: str
    num_layers: int
    block_tokens: int
    stages: tuple[Layers, ...] = ()
    """How the plan cuts the decode graph, in order; empty: one stage of all layers."""
    first_epoch: int = 0
    """Epochs count on from here. Nodes remember epochs, so a restarted orchestrator must begin above the one before."""
    heartbeat_interval_s: float = 0.1
    suspect_after_s: float = 0.3
    """Silence after which a node gets no new work."""
    dead_after_s: float = 5.0
    """Silence after which a node is given up. A reset stream is death at once; this bound is for stopped processes, and
    is generous because a busy machine delays heartbeats."""
    release_timeout_s: float = 30.0
    """A node that does not answer a release for so long is given up."""
    attempt_timeout_s: float = 120.0
    """An attempt from which nothing is heard for so long is made again elsewhere."""
    placement_timeout_s: float = 120.0
    """A request that finds no place for so long fails."""
    max_attempts: int = 5
    retry_delay_s: float = 0.02
    """Pause before a request goes on after a node refused it; doubled with every attempt."""
    max_waiting: int = 512
    """Requests that may wait; more are rejected with a retry hint."""

    def __post_init__(self) -> None:
        if not 0 < self.heartbeat_interval_s < self.suspect_after_s < self.dead_after_s:
            raise CoreConfigError(
                "heartbeat_interval_s < suspect_after_s < dead_after_s must hold; they are "
                f"{self.heartbeat_interval_s}, {self.suspect_after_s}, {self.dead_after_s}"
            )
        for name in ("num_layers", "block_tokens", "max_attempts", "max_waiting"):
            if getattr(self, name) < 1:
                raise CoreConfigError(f"{name} must be at least 1; it is {getattr(self, name)}")

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)
