"""Starts a bundle's planned nodes as processes of this machine, and keeps them alive."""

import asyncio
import contextlib
import itertools
import logging
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from dataclasses import dataclass
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


class NodeStartError(RuntimeError):
    """A node of this machine does not come up; what it said is in the log."""


@dataclass(frozen=True, kw_only=True)
class LocalNode:
    """A node to start, named like its device."""

    node_id: str
    engine: str
    spare: bool = False


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
    return [*planned, *(LocalNode(node_id=f"spare{n}", engine=decode[0], spare=True) for n in range(spares))]


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

        Raises NodeStartError for a node that ends again and again before it has ever joined: it never will.
        """
        loop = asyncio.get_running_loop()
        backoff_s = FIRST_BACKOFF_S
        for starts in itertools.count(1):
            started_s = loop.time()
            code = await self._run_once(node)
            if starts >= MAX_FAILED_STARTS and not self.has_joined(node.node_id):
                raise NodeStartError(f"node {node.node_id} ended {starts} times before it joined (exit status {code})")
            backoff_s = FIRST_BACKOFF_S if loop.time() - started_s > STEADY_S else min(2 * backoff_s, LONGEST_BACKOFF_S)
            logger.warning("node=%s exited code=%d restart_in_s=%.1f", node.node_id, code, backoff_s)
            await asyncio.sleep(backoff_s)

    async def _run_once(self, node: LocalNode) -> int:
        process = await asyncio.create_subprocess_exec(*self._command(node))
        logger.info("node=%s started pid=%d engine=%s", node.node_id, process.pid, node.engine)
        try:
            return await process.wait()
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


async def _stop(process: Process) -> None:
    """Ask it to stop, then make it."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
