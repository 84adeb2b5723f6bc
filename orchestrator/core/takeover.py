"""How a request goes on when nodes under it are lost: a pure function of who holds which KV, and how far."""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from itertools import zip_longest

from edgellm.orchestrator.core.links import Link
from edgellm.orchestrator.core.pipelines import Pipeline, Stage
from edgellm.orchestrator.core.values import ConnectionId, Layers


@dataclass(frozen=True, kw_only=True)
class Copy:
    """`holder` has the KV of a stage of `source`."""

    layers: Layers
    source: ConnectionId
    reader: ConnectionId
    """Sends it the KV of the prompt: the node that reads the prompt, or `source` where it was read already."""
    holder: ConnectionId
    tokens: int = 0
    """Its first positions, as far as the holder has reported."""
    since_s: float = 0.0
    """When it was begun, or the prompt was read, whichever was later."""
    live: bool = True
    """Kept up to date; one that is not still serves to go on from where it ends."""


@dataclass(frozen=True, kw_only=True)
class Takeover:
    """The same stages on other nodes, and what of their KV counts."""

    pipeline: Pipeline
    tokens: int
    """Positions that every stage has: what comes after them is computed again from tokens that are known."""
    copies: tuple[Copy, ...]
    """Those that still are copies, to be kept up from where they end."""


def plan_takeover(
    pipeline: Pipeline,
    copies: Sequence[Copy],
    lost: Collection[ConnectionId],
    *,
    kv_tokens: int,
    prompt_tokens: int,
    avoid: Set[Link] = frozenset(),
) -> Takeover | None:
    """1. A stage stays where it is, unless its node is lost; then the holder of its longest copy carries it, of one
       that takes no link of `avoid` to the stages beside it if there is any.
    2. All stages are cut to what the shortest of them has; those that stay have `kv_tokens` positions.
    3. None where a stage has no copy of at least the prompt: only the prompt can restore what comes before.
    """
    stages, tokens = list[Stage](), kv_tokens
    for stage, following in zip_longest(pipeline, pipeline[1:]):
        if stage.connection not in lost:
            stages.append(stage)
            continue
        out_of_reach = _out_of_reach(avoid, stages[-1:], [following] if following else [])
        usable = _usable(copies, stage, lost, prompt_tokens)
        copy = max(usable, key=lambda copy: (copy.holder not in out_of_reach, copy.tokens), default=None)
        if copy is None:
            return None
        stages.append(Stage(connection=copy.holder, layers=stage.layers))
        tokens = min(tokens, copy.tokens)
    kept = (copy for copy in copies if copy.holder not in lost and copy.tokens >= prompt_tokens)
    remaining = tuple(
        replace(copy, tokens=min(copy.tokens, tokens), live=True) for copy in kept if _still_copy(copy, stages)
    )
    return Takeover(pipeline=tuple(stages), tokens=tokens, copies=remaining)


def _out_of_reach(avoid: Set[Link], before: Sequence[Stage], after: Sequence[Stage]) -> set[ConnectionId]:
    """Nodes that should not carry what is between these stages."""
    senders, receivers = {stage.connection for stage in before}, {stage.connection for stage in after}
    return {to for one, to in avoid if one in senders} | {one for one, to in avoid if to in receivers}


def _usable(copies: Sequence[Copy], stage: Stage, lost: Collection[ConnectionId], prompt_tokens: int) -> Iterator[Copy]:
    for copy in copies:
        if copy.layers == stage.layers and copy.holder not in lost and copy.tokens >= prompt_tokens:
            yield copy


def _still_copy(copy: Copy, stages: Sequence[Stage]) -> bool:
    """Its source carries the stage as before, and its holder does not."""
    return any(stage.layers == copy.layers and stage.connection == copy.source for stage in stages)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a request is."""

    prompt_tokens: int
    known_tokens: int
    """Generated and given to the client; the last one has no KV yet."""
    remaining_tokens: int

    @property
    def positions(self) -> int:
        """Whose token is known, and whose KV must be there before the next token."""
        return self.prompt_tokens + self.known_tokens - 1


@dataclass(frozen=True, kw_only=True)
class RecoveryCost:
    """Predicts both ways to go on, in seconds until the last token, from measured speeds."""

    prefill_tokens_per_s: float
    """Of all who could read the prompt, above 0."""
    waiting_tokens: int
    """Prompt tokens that would be read before."""
    replay_row: float = 0.25
    """What a known token costs to compute again, as a part of a step: many rows of one sequence share a step's
    weights. An assumption."""

    def restore_s(self, takeover: Takeover, progress: Progress, step_s: float) -> float:
        """Only what the copies lack is computed again."""
        return step_s * (self.replay_row * (progress.positions - takeover.tokens) + progress.remaining_tokens)

    def recompute_s(self, progress: Progress, step_s: float) -> float:
        """The prompt is read again behind those that wait, and all known tokens are replayed."""
        read_s = (self.waiting_tokens + progress.prompt_tokens) / self.prefill_tokens_per_s
        replayed = progress.positions - progress.prompt_tokens
        return read_s + step_s * (self.replay_row * replayed + progress.remaining_tokens)


@dataclass(frozen=True, kw_only=True)
class Part:
    """KV that a node brought along; `home` is the stage it was started for."""

    connection: ConnectionId
    layers: Layers
    tokens: int
    home: Layers | None


def plan_from_parts(
    cut: Sequence[Layers], parts: Sequence[Part], *, kv_tokens: int, prompt_tokens: int
) -> Takeover | None:
    """Build a pipeline from what nodes hold of one attempt: each stage goes to who has most of it, at home if equal.

    The rest are copies. None where nobody has a stage up to the end of the prompt. `kv_tokens`: more than these
    positions do not count, since no token is known for them.
    """
    stages, tokens, copies = list[Stage](), kv_tokens, list[Copy]()
    for layers in cut:
        able = [part for part in parts if layers in part.layers and part.tokens >= prompt_tokens]
        if not able:
            return None
        best = max(able, key=lambda part: (min(part.tokens, kv_tokens), part.home == layers, -part.connection))
        stages.append(Stage(connection=best.connection, layers=layers))
        tokens = min(tokens, best.tokens)
        copies += [
            Copy(
                layers=layers,
                source=best.connection,
                reader=best.connection,
                holder=part.connection,
                tokens=part.tokens,
            )
            for part in able
            if part.connection != best.connection
        ]
    kept = tuple(replace(copy, tokens=min(copy.tokens, tokens)) for copy in copies)
    return Takeover(pipeline=tuple(stages), tokens=tokens, copies=kept)
