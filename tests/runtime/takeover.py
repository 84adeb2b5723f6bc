"""An orchestrator by hand: one request on a pipeline with copies, moved when a node dies."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from edgellm.runtime.rpc import cluster_pb2
from tests.runtime.conftest import (
    Orchestrator,
    Running,
    attempt,
    decode,
    eventually,
    generation,
    node,
    orchestrating,
    prefill,
)


@dataclass(frozen=True)
class Part:
    """Layers of the pipeline, who carries them, and who keeps their copy."""

    layers: range
    carrier: str
    holder: str | None = None


@dataclass
class Nodes:
    """By name; `kill` ends one without a word to anybody."""

    orchestrator: Orchestrator
    running: dict[str, Running] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    """Where others are told to find a node, if not where it listens."""

    async def kill(self, name: str) -> None:
        gone = self.running.pop(name)
        gone.task.cancel()
        await asyncio.gather(gone.task, return_exceptions=True)

    def address(self, name: str) -> str:
        return self.addresses.get(name, self.running[name].joined.hello.exchange_address)

    def target(self, name: str, layers: range, *, backup: bool) -> cluster_pb2.KvTarget:
        hello = self.running[name].joined.hello
        return cluster_pb2.KvTarget(
            node_id=name, address=self.address(name), host_id=hello.host_id, first_layer=layers.start,
            num_layers=len(layers), backup=backup,
        )  # fmt: skip

    def stage(self, part: Part) -> cluster_pb2.Stage:
        hello = self.running[part.carrier].joined.hello
        return cluster_pb2.Stage(
            node_id=part.carrier, address=self.address(part.carrier), host_id=hello.host_id,
            first_layer=part.layers.start, num_layers=len(part.layers),
        )  # fmt: skip

    def copies(self, parts: Sequence[Part], from_token: int) -> list[cluster_pb2.Copy]:
        return [
            cluster_pb2.Copy(
                source_node_id=part.carrier, target=self.target(part.holder, part.layers, backup=True),
                from_token=from_token,
            )
            for part in parts
            if part.holder is not None
        ]  # fmt: skip


class Request:
    """One greedy request, as an orchestrator follows it."""

    def __init__(self, nodes: Nodes, name: str, prompt: Sequence[int], max_tokens: int) -> None:
        self.nodes, self.name, self.prompt, self.wish = nodes, name, list(prompt), generation(max_tokens)
        self.epoch = 0
        self.parts: list[Part] = []
        self.tokens: list[int] = []

    async def begin(self, reader: str, parts: Sequence[Part]) -> None:
        """Read the prompt, send its KV to carriers and holders, and let the pipeline write."""
        self.parts = list(parts)
        targets = [self.nodes.target(part.carrier, part.layers, backup=False) for part in parts]
        targets += [
            self.nodes.target(part.holder, part.layers, backup=True) for part in parts if part.holder is not None
        ]
        joined = self.nodes.running[reader].joined
        joined.send(prefill=prefill(self.name, self.prompt, self.wish, targets=targets))
        [done] = await joined.wait_for("PrefillDone", self.name)
        self.tokens = [done.first_token.token_id]
        command = decode(self.name, self.prompt, self.wish, self.tokens)
        command.stages.extend(self.nodes.stage(part) for part in parts)
        command.copies.extend(self.nodes.copies(parts, len(self.prompt)))
        for name in {part.carrier for part in parts}:
            self.nodes.running[name].joined.send(decode=command)

    async def read_tokens(self, count: int) -> None:
        """Until that many are known; each index once, whatever epoch it came from."""
        joined = self.nodes.running[self.parts[-1].carrier].joined
        await eventually(lambda: self._take(joined.events) or len(self.tokens) >= count)

    def watermark(self, part: Part) -> int:
        """As the holder has reported it last, layer by layer."""
        reached: dict[int, int] = {}
        for event in self.nodes.running[part.holder].joined.events:
            for one in event.kv_copied.copies:
                if one.attempt == attempt(self.name, self.epoch):
                    reached |= dict.fromkeys(range(one.first_layer, one.first_layer + one.num_layers), one.tokens)
        return min(reached.get(layer, 0) for layer in part.layers)

    async def protected(self, *, tokens: int) -> None:
        """Until the copies of all parts that have holders reach so many positions."""
        await eventually(lambda: all(self.watermark(part) >= tokens for part in self.parts if part.holder))

    def protect(self, parts: Sequence[Part]) -> None:
        """Copies from the first position on, for what has no holder yet."""
        self.parts = list(parts)
        for part in parts:
            protect = cluster_pb2.Protect(attempt=attempt(self.name, self.epoch), copies=self.nodes.copies([part], 0))
            self.nodes.running[part.carrier].joined.send(protect=protect)

    def resume(self, parts: Sequence[Part], *, tokens: int, holds: Sequence[str] = ()) -> None:
        """A takeover: the next epoch, from the first `tokens` positions on, as far as all tokens before are known."""
        tokens = min(tokens, len(self.prompt) + len(self.tokens) - 1)
        old, self.epoch, self.parts = attempt(self.name, self.epoch), self.epoch + 1, list(parts)
        command = decode(self.name, self.prompt, self.wish, self.tokens, epoch=self.epoch)
        command.stages.extend(self.nodes.stage(part) for part in parts)
        command.copies.extend(self.nodes.copies(parts, tokens))
        command.resume_from.CopyFrom(old)
        command.resume_tokens = tokens
        hold = cluster_pb2.Hold(attempt=attempt(self.name, self.epoch), resume_from=old, resume_tokens=tokens)
        for name in {part.carrier for part in parts}:
            self.nodes.running[name].joined.send(decode=command)
        for name in holds:
            self.nodes.running[name].joined.send(hold=hold)

    async def release(self) -> None:
        """Everywhere; every block of it is free then."""
        for one in self.nodes.running.values():
            one.joined.send(release=cluster_pb2.Release(attempt=attempt(self.name, self.epoch)))
        for one in self.nodes.running.values():
            await one.joined.wait_for("Released", self.name)

    def failures(self) -> list[object]:
        """What nodes said went wrong with it."""
        return [
            event.request_failed
            for one in self.nodes.running.values()
            for event in one.joined.events
            if event.WhichOneof("message") == "request_failed" and event.request_failed.attempt.request_id == self.name
        ]

    def _take(self, events: Sequence[cluster_pb2.NodeMessage]) -> None:
        for event in events:
            for one in event.tokens.tokens:
                if one.attempt == attempt(self.name, self.epoch) and one.token.index == len(self.tokens):
                    self.tokens.append(one.token.token_id)


def on_nodes(test, roles: Mapping[str, dict], **common) -> None:
    """Run `test(nodes)`; `roles` are each node's options: `phase`, and what `node` takes."""

    async def run() -> None:
        async with AsyncExitStack() as stack:
            nodes = Nodes(await stack.enter_async_context(orchestrating()))
            for name, options in roles.items():
                nodes.running[name] = await stack.enter_async_context(
                    node(nodes.orchestrator, name, **(common | options))
                )
            async with asyncio.timeout(120):
                await test(nodes)

    asyncio.run(run())
