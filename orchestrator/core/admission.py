"""What can never be served, what cannot be served now, and how to say so."""

from collections.abc import Sequence

from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.nodes import NodeRegistry
from edgellm.orchestrator.core.pipelines import Stage, form_pipelines
from edgellm.orchestrator.core.requests import Request
from edgellm.orchestrator.core.values import RequestSpec

UNMEASURED_PREFILL_TOKENS_PER_S = 500.0


def impossibility(config: CoreConfig, nodes: NodeRegistry, spec: RequestSpec) -> str | None:
    """Why the request would not fit even an idle cluster, with the arithmetic; None if it would.

    Nodes that are dead count: they may come back. While no decode node has ever joined nothing is impossible.
    """
    prompt_tokens, max_tokens = len(spec.prompt), spec.generation.max_tokens
    needed = config.blocks_for(prompt_tokens + max_tokens)
    largest = _largest(config, nodes, needed)
    if needed <= largest:
        return None
    return (
        f"{prompt_tokens} prompt tokens + {max_tokens} to generate need {needed} KV blocks of {config.block_tokens} "
        f"tokens, the largest decode node has {largest} ({largest * config.block_tokens} tokens): ask for fewer tokens"
    )


def _largest(config: CoreConfig, nodes: NodeRegistry, default: int) -> int:
    """Blocks of the largest request: every stage must find a decode node that holds it."""
    decoders = [(node.profile.kv_blocks, node.carrier(config.cut)) for node in nodes]
    sizes = [
        max((blocks for blocks, c in decoders if c.role == "decode" and layers in c.carries), default=default)
        for layers in config.cut
    ]
    return min(sizes)


def lateness(nodes: NodeRegistry, waiting: Sequence[Request], spec: RequestSpec, now_s: float) -> str | None:
    """Why the deadline would pass before the prompt is even read, by measured speeds; None if it would not.

    Only prompts with an earlier deadline count as ahead of it: a policy may let all others wait. To refuse now is
    kinder than to fail later (Mooncake, FAST'25), and leaves the devices to those who can be served.
    """
    speed = sum(node.load.prefill_tokens_per_s for node in nodes.ready())
    if spec.deadline_s is None or speed == 0:
        return None
    ahead_tokens = sum(len(other.spec.prompt) for other in waiting if _is_earlier(other.spec, spec.deadline_s))
    reading_s = (ahead_tokens + len(spec.prompt)) / speed
    left_s = spec.deadline_s - now_s
    if reading_s <= left_s:
        return None
    return (
        f"{ahead_tokens} prompt tokens wait ahead of {len(spec.prompt)}, which takes {1000 * reading_s:.0f} ms at "
        f"{speed:.0f} tokens/s, and the deadline is in {1000 * left_s:.0f} ms: try again later, or allow more time"
    )


def _is_earlier(spec: RequestSpec, deadline_s: float) -> bool:
    return spec.deadline_s is not None and spec.deadline_s < deadline_s


def retry_after_ms(nodes: NodeRegistry, waiting: Sequence[Request]) -> int:
    """Time in which half of the waiting prompts will have been read at the measured speeds; 100 ms to a minute."""
    tokens = sum(len(request.spec.prompt) for request in waiting)
    speed = sum(node.load.prefill_tokens_per_s for node in nodes.ready()) or UNMEASURED_PREFILL_TOKENS_PER_S
    return round(min(max(100.0, 500 * tokens / speed), 60_000.0))


def why_waiting(config: CoreConfig, nodes: NodeRegistry, request: Request) -> str:
    """For a request that found no place in time: what is missing."""
    waited = f"found no place for {config.placement_timeout_s:.0f} s: "
    pipelines = form_pipelines(nodes.carriers(config.cut), config.cut)
    if not pipelines:
        return waited + "no decode node is ready"
    half_precision = any(node.can_prefill(config.num_layers) for node in nodes.ready())
    if not half_precision and not request.spec.allow_degraded_prefill:
        return waited + "no half-precision prefill engine is ready, and the request does not allow degraded prefill"
    needed = config.blocks_for(request.capacity_tokens)
    free = max(min(_free_blocks(nodes, stage) for stage in pipeline) for pipeline in pipelines)
    return waited + f"it needs {needed} KV blocks on one decode node, at most {free} are free"


def _free_blocks(nodes: NodeRegistry, stage: Stage) -> int:
    node = nodes.get(stage.connection)
    return node.free_blocks if node is not None and node.state != "suspect" else 0
