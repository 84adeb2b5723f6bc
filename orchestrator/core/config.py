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
    """Epochs count on from here, or from the highest that a node has heard of."""
    heartbeat_interval_s: float = 0.1
    suspect_after_s: float = 0.3
    """Silence after which a node gets no new work."""
    dead_after_s: float = 0.5
    """Silence after which a node is given up. A reset stream is death at once; this bound is for stopped processes. It
    is short because a false death costs little: copies take over, and the node joins again."""
    release_timeout_s: float = 30.0
    """A node that does not answer a release for so long is given up."""
    attempt_timeout_s: float = 120.0
    """An attempt from which nothing is heard for so long is made again elsewhere."""
    placement_timeout_s: float = 120.0
    """A request that finds no place for so long fails."""
    broken_link_grace_s: float = 0.15
    """A node that a peer cannot reach is most likely dead. If it is still there after so long, the link is what broke,
    and requests are moved away from it."""
    link_pause_s: float = 5.0
    """For so long a link between two nodes that failed is avoided, where there is another way; twice as long after each
    further failure, until something gets through."""
    longest_link_pause_s: float = 60.0
    hot_copies: bool = True
    """Whether every stage's KV is copied to another node while it grows. Without copies the loss of a decode node costs
    reading the prompt again."""
    max_new_copies: int = 4
    """Copies that are made from the first token at a time, in the whole cluster."""
    protect_pause_s: float = 1.0
    """Between two tries to find a holder for a missing copy."""
    copy_timeout_s: float = 20.0
    """A copy that lacks some of the prompt for so long after it was read is given up."""
    recovery_wait_s: float = 1.5
    """After a restart, how long requests wait for nodes to say what they hold, before their prompts are read again."""
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
        ends = [0, *(stage.end for stage in self.cut)]
        if [stage.first for stage in self.cut] != ends[:-1] or ends[-1] != self.num_layers:
            raise CoreConfigError(
                f"the stages {[str(stage) for stage in self.cut]} do not cut {self.num_layers} layers"
            )

    @property
    def cut(self) -> tuple[Layers, ...]:
        """The stages of every pipeline."""
        return self.stages or (Layers(0, self.num_layers),)

    def blocks_for(self, tokens: int) -> int:
        """KV blocks that hold `tokens` tokens."""
        return -(-tokens // self.block_tokens)
