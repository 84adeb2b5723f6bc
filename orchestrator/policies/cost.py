"""What a path to the first decoded token costs in seconds, from measured speeds and the link."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgellm.jetson.profiles import GIGABIT_ETHERNET_GB_S, LOOPBACK_GB_S
from edgellm.orchestrator.core.policy import NodeView, WaitingRequest
from edgellm.orchestrator.policies.room import Decoders, failed_links


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Prompt reading is linear in tokens; KV is sent while the prompt is read, but for its last chunk."""

    unmeasured_prefill_tokens_per_s: float = 500.0
    """Until any node has reported its speed."""
    same_host_bytes_per_s: float = 1e9 * LOOPBACK_GB_S
    network_bytes_per_s: float = 1e9 * GIGABIT_ETHERNET_GB_S
    network_latency_s: float = 0.0004
    chunk_tokens: int = 128
    interference: float = 1.0
    """Cost of stalling one running answer for a second by reading a prompt beside it."""
    reluctance: float = 1.5
    """Reading on a decode node must be this much sooner to be worth it: answers that start meanwhile stall as well."""
    interruption_s: float = 0.005
    """Least cost of changing a decode device over to another engine and back: an assumption, about one step."""

    failed_link_s: float = 10.0
    """What it costs to try a link that failed lately: where it still fails, the network takes about so long to give up.
    Waiting for others is better, but not without end."""

    def with_speeds(self, nodes: Sequence[NodeView]) -> list[NodeView]:
        """The nodes, those that have not measured their reading speed with the mean of those that have."""
        measured = [node.prefill_tokens_per_s for node in nodes if node.prefill_tokens_per_s > 0]
        assumed = sum(measured) / len(measured) if measured else self.unmeasured_prefill_tokens_per_s
        return [replace(node, prefill_tokens_per_s=node.prefill_tokens_per_s or assumed) for node in nodes]

    def read_s(self, node: NodeView, tokens: int) -> float:
        """Time to read `tokens` prompt tokens on an idle node."""
        return tokens / node.prefill_tokens_per_s

    def send_s(self, prefill: NodeView, decode: Decoders, tokens: int) -> float:
        """Time that the KV of `tokens` tokens is on the links: each stage's layers go to its node."""
        layers = sum(stage.layers.count for stage in decode.pipeline)
        hosts = {node.connection: node.host_id for node in decode.nodes}
        seconds = 0.0
        for stage in decode.pipeline:
            if stage.connection != prefill.connection:
                same_host = prefill.host_id == hosts[stage.connection]
                speed = self.same_host_bytes_per_s if same_host else self.network_bytes_per_s
                seconds += tokens * prefill.kv_bytes_per_token * stage.layers.count / layers / speed
        return 2 * self.network_latency_s + seconds

    def remote_s(self, request: WaitingRequest, prefill: NodeView, decode: Decoders) -> float:
        """Queue and prompt on the prefill node, then what sending did not hide behind reading."""
        read_s = self.read_s(prefill, request.prompt_tokens)
        return self.read_s(prefill, prefill.prefill_tokens) + read_s + self._sending_s(request, prefill, decode)

    def local_s(self, request: WaitingRequest, decode: Decoders) -> float:
        """Prompt on the node of the first stage, which holds up the answers that run there."""
        head = decode.head
        tokens = head.prefill_tokens + request.prompt_tokens
        stalled = self.reluctance + self.interference * decode.running
        sending_s = self._sending_s(request, head, decode) if len(decode.nodes) > 1 else 0.0
        return self.interruption_s + self.read_s(head, tokens) * stalled + sending_s

    def _sending_s(self, request: WaitingRequest, prefill: NodeView, decode: Decoders) -> float:
        risk_s = self.failed_link_s * failed_links(prefill, decode)
        return risk_s + self._exposed_s(request, prefill, decode)

    def _exposed_s(self, request: WaitingRequest, prefill: NodeView, decode: Decoders) -> float:
        last_chunk = min(request.prompt_tokens, self.chunk_tokens)
        hidden_s = self.read_s(prefill, request.prompt_tokens) * (1 - last_chunk / request.prompt_tokens)
        send_s = self.send_s(prefill, decode, request.prompt_tokens)
        return max(send_s - hidden_s, self.send_s(prefill, decode, last_chunk))
