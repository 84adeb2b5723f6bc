"""Starts a bundle's planned nodes as processes of this machine, and keeps them alive."""

import asyncio
import contextlib
import itertools
import logging
import re
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from edgellm.orchestrator.bundle import BundleError, Plan

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
STEADY_S = 30.0
"""A node that ran for so long starts again without delay."""
MAX_FAILED_STARTS = 3
"""Of a node that never joined."""
LONGEST_REFUSAL = 4096
"""Bytes."""


class NodeStartError(RuntimeError):
    """A node of this machine does not come up; what it said is in the log."""


@dataclass(frozen=True, kw_only=True)
class LocalNode:
    """A node to start, named like its device."""

    node_id: str
    engine: str
    spare: bool = False
    followers: "tuple[LocalNode, ...]" = ()
    """The other ranks of a tensor-parallel engine: they do not join, and start and end with this node."""


def planned_nodes(plan: Plan, spares: int = 0) -> list[LocalNode]:
    """One node per placement, and as many spares. Several placements on one device are told apart by their engine.

    Raises BundleError for spares where the plan has no decode engine.
    """
    devices = [placement.device for placement in plan.placements]
    planned = [
        LocalNode(
            node_id=p.device if devices.count(p.device) == 1 else f"{p.device}.{p.engine}",
            engine=p.engine,
        )
        for p in plan.placements
    ]
    decode = [placement.engine for placement in plan.placements if placement.role == "decode"]
    if spares and not decode:
        raise BundleError("the plan has no decode engine, so there is nothing that a spare could take over")
    return [*_grouped(planned), *(LocalNode(node_id=f"spare{n}", engine=decode[0], spare=True) for n in range(spares))]


def _grouped(planned: Iterable[LocalNode]) -> list[LocalNode]:
    """The plan names the ranks of an engine one after the other, rank 0 first."""
    nodes: list[LocalNode] = []
    for node in planned:
        rank = re.search(r"-tp(\d+)of\d+$", node.engine)
        if rank is None or int(rank[1]) == 0:
            nodes.append(node)
        else:
            nodes[-1] = replace(nodes[-1], followers=(*nodes[-1].followers, node))
    return nodes


@dataclass(frozen=True, kw_only=True)
class _Ending:
    """How a node's process ended."""

    code: int
    refusal: str
    """Why the bundle cannot be run here; empty where it ended for another reason."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _NodeProcess:
    process: Process
    refusal: socket.socket
    """Does not block: a process that this one has started may have the other end still."""

    async def ending(self) -> _Ending:
        code = await self.process.wait()
        with contextlib.suppress(BlockingIOError):
            return _Ending(code=code, refusal=self.refusal.recv(LONGEST_REFUSAL).decode(errors="replace"))
        return _Ending(code=code, refusal="")


@dataclass(frozen=True, kw_only=True)
class NodeLauncher:
    """Runs nodes until it is cancelled."""

    orchestrator: str
    bundle: Path
    options: tuple[str, ...] = ()
    """Passed on to every node."""
    has_joined: Callable[[str], bool]
    """Whether a node has ever been part of the cluster."""

    async def keep_running(self, node: LocalNode) -> None:
        """Start the node, and again after it ended, with growing pauses. When cancelled, stop it.

        Raises NodeStartError, of a node that has never joined: at once where it cannot run the bundle, else when it
        has ended again and again.
        """
        loop = asyncio.get_running_loop()
        backoff_s = 0.0
        for starts in itertools.count(1):
            started_s = loop.time()
            ending = await self._run_once(node)
            if not self.has_joined(node.node_id):
                _give_up(node, ending, starts)
            backoff_s = _next_backoff_s(backoff_s, ran_s=loop.time() - started_s)
            why = f" reason={ending.refusal}" if ending.refusal else ""
            logger.warning("node=%s exited code=%d restart_in_s=%.1f%s", node.node_id, ending.code, backoff_s, why)
            await asyncio.sleep(backoff_s)

    async def _run_once(self, node: LocalNode) -> _Ending:
        """Until it or one of its followers has ended; then none of them is left."""
        together = ("--tp-leader", f"127.0.0.1:{_free_port()}") if node.followers else ()
        async with contextlib.AsyncExitStack() as stack:
            processes = [
                await stack.enter_async_context(self._process(one, together)) for one in (*node.followers, node)
            ]
            waits = [asyncio.ensure_future(process.ending()) for process in processes]
            try:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            return max((wait.result() for wait in done), key=lambda ending: bool(ending.refusal))

    @contextlib.asynccontextmanager
    async def _process(self, node: LocalNode, options: Iterable[str]) -> AsyncIterator[_NodeProcess]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with ours:
            with theirs:
                command = (*self._command(node), *options, "--refusal-fd", str(theirs.fileno()))
                process = await asyncio.create_subprocess_exec(*command, pass_fds=(theirs.fileno(),))
            logger.info("node=%s started pid=%d engine=%s", node.node_id, process.pid, node.engine)
            try:
                yield _NodeProcess(process=process, refusal=ours)
            finally:
                await _stop(process)

    def _command(self, node: LocalNode) -> list[str]:
        return [
            sys.executable,
            "-m",
            "edgellm.runtime.cli",
            *("--orchestrator", self.orchestrator),
            *("--bundle", str(self.bundle)),
            *("--engine", node.engine),
            *("--node-id", node.node_id),
            *(("--spare",) if node.spare else ()),
            "--exit-with-parent",
            *self.options,
        ]


def _give_up(node: LocalNode, ending: _Ending, starts: int) -> None:
    """Raises NodeStartError if it would not help to start the node again."""
    if ending.refusal:
        raise NodeStartError(f"node {node.node_id}: {ending.refusal}")
    if starts >= MAX_FAILED_STARTS:
        raise NodeStartError(f"node {node.node_id} ended {starts} times before it joined (exit status {ending.code})")


def _next_backoff_s(before_s: float, *, ran_s: float) -> float:
    return 0.0 if ran_s >= STEADY_S else min(max(FIRST_BACKOFF_S, 2 * before_s), LONGEST_BACKOFF_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _stop(process: Process) -> None:
    """Ask it to stop, even if it stands still, then make it."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        process.send_signal(signal.SIGCONT)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
