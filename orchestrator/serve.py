"""edgellm-serve: the orchestrator of one bundle and, unless told otherwise, its nodes on this machine."""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from prometheus_client import start_http_server

from edgellm.orchestrator.arguments import integer_from, positive
from edgellm.orchestrator.background import beside
from edgellm.orchestrator.bundle import BundleError, ServedBundle, open_bundle
from edgellm.orchestrator.core.config import CoreConfig, CoreConfigError
from edgellm.orchestrator.core.values import NodeId
from edgellm.orchestrator.journal import JournalError, JournalFile, Written
from edgellm.orchestrator.journal_writer import JournalWriter
from edgellm.orchestrator.local_nodes import LocalNode, NodeLauncher, NodeStartError, planned_nodes
from edgellm.orchestrator.policies import POLICIES
from edgellm.orchestrator.server import ListenError, Orchestrator, can_serve, core_config, run_orchestrator

AUTOMATIC = "automatic"


class ReadyFileError(RuntimeError):
    """The ready file cannot be written."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of edgellm-serve."""

    bundle: Path
    listen: str = "127.0.0.1:50051"
    local_nodes: bool = True
    spares: int = 0
    """Further local nodes, which hold copies and take over."""
    hot_copies: bool = CoreConfig.hot_copies
    dead_after_s: float = CoreConfig.dead_after_s
    journal: Path | None = None
    """None: there is none."""
    threads: int | None = None
    """Of each local node; None: its own default."""
    policy: str = "dual_pool"
    metrics_port: int | None = None
    ready_file: Path | None = None
    verbose: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    config = _parse(argv)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its own lines tell of every stream that somebody ended
    logging.basicConfig(
        level=logging.INFO if config.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    try:
        asyncio.run(_serve(config))
    except (BundleError, CoreConfigError, JournalError, ListenError, NodeStartError, ReadyFileError) as error:
        print(f"edgellm-serve: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> ServeConfig:
    parser = argparse.ArgumentParser(prog="edgellm-serve", description="Serve a bundle over gRPC.")
    parser.add_argument("--bundle", type=Path, required=True, help="folder made by edgellm-build")
    parser.add_argument("--listen", default=ServeConfig.listen, help="host:port; port 0 takes a free one (%(default)s)")
    parser.add_argument(
        "--no-local-nodes",
        dest="local_nodes",
        action="store_false",
        help="start no nodes here: wait for edgellm-node processes to join",
    )
    parser.add_argument(
        "--spares",
        type=integer_from(0),
        default=ServeConfig.spares,
        help="further local nodes, to take over (%(default)s)",
    )
    parser.add_argument(
        "--no-hot-copies",
        dest="hot_copies",
        action="store_false",
        help="keep no copies of KV: when a decode node dies, prompts are read again",
    )
    parser.add_argument(
        "--dead-after",
        dest="dead_after_s",
        type=positive,
        default=ServeConfig.dead_after_s,
        metavar="SECONDS",
        help="silence after which a node is given up (%(default)s)",
    )
    parser.add_argument(
        "--journal",
        default=AUTOMATIC,
        metavar="PATH",
        help="what a restart goes on from; `off` for none (a file per bundle and port in ~/.local/state/edgellm)",
    )
    parser.add_argument("--threads", type=integer_from(1), help="threads of each local node")
    parser.add_argument("--policy", choices=sorted(POLICIES), default=ServeConfig.policy)
    parser.add_argument("--metrics-port", type=int, help="serve Prometheus metrics on this port")
    parser.add_argument(
        "--ready-file", type=Path, help="written as JSON once requests can come; with --no-local-nodes, once nodes can"
    )
    parser.add_argument("--verbose", action="store_true", help="log every state change")
    options = parser.parse_args(argv)
    options.journal = _journal_path(options.journal, options.bundle, options.listen)
    return ServeConfig(**vars(options))


def _journal_path(choice: str, bundle: Path, listen: str) -> Path | None:
    """By default a file of this bundle and port, so that the same command finds it again, and no other one does.

    On a port that the system chooses there is none by default: nobody could find the server again either.
    """
    host, _, port = listen.rpartition(":")
    if choice == "off" or (choice == AUTOMATIC and port in ("", "0")):
        return None
    if choice != AUTOMATIC:
        return Path(choice)
    return Path.home() / ".local" / "state" / "edgellm" / f"{bundle.resolve().name}-{host}-{port}.journal"


async def _serve(config: ServeConfig) -> None:
    bundle = open_bundle(config.bundle)
    nodes = planned_nodes(bundle.index.plan, config.spares) if config.local_nodes else []
    bounds = replace(core_config(bundle), hot_copies=config.hot_copies, dead_after_s=config.dead_after_s)
    stop = _stop_on_signals()
    async with contextlib.AsyncExitStack() as stack:
        journal, written, epoch = _open_journal(config, bundle, stack)
        bounds = replace(bounds, first_epoch=max(bounds.first_epoch, epoch))
        policy = POLICIES[config.policy]()
        running = await stack.enter_async_context(
            run_orchestrator(bundle, bounds, policy, config.listen, journal=journal, written=written)
        )
        _start_metrics(config, running)
        async with beside(*_node_tasks(config, running, nodes), _announce(config, bundle, running, nodes)):
            await stop.wait()


def _open_journal(
    config: ServeConfig, bundle: ServedBundle, stack: contextlib.AsyncExitStack
) -> tuple[JournalWriter | None, list[Written], int]:
    """The journal that is written from now on, what it has already, and its epoch. Raises JournalError."""
    if config.journal is None:
        return None, [], 0
    file = JournalFile(config.journal, bundle.sha256)
    written, epoch = file.read(), file.epoch()
    return stack.enter_context(JournalWriter(file, asyncio.get_running_loop())), written, epoch


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _start_metrics(config: ServeConfig, running: Orchestrator) -> None:
    if config.metrics_port is None:
        return
    try:
        host = running.address.rpartition(":")[0]
        start_http_server(config.metrics_port, host, running.driver.metrics.registry)
    except (OSError, OverflowError) as error:
        raise ListenError(f"cannot serve metrics on port {config.metrics_port}: {error}") from error


def _node_tasks(
    config: ServeConfig, running: Orchestrator, nodes: Sequence[LocalNode]
) -> list[Coroutine[Any, Any, None]]:
    options: tuple[str, ...] = ("--log-level", "info" if config.verbose else "warning")
    if config.threads is not None:
        options += ("--threads", str(config.threads))
    known = running.driver.core.state.nodes
    launcher = NodeLauncher(
        orchestrator=running.address,
        bundle=config.bundle,
        options=options,
        has_joined=lambda node_id: known.named(NodeId(node_id)) is not None,
    )
    return [launcher.keep_running(node) for node in nodes]


async def _announce(
    config: ServeConfig, bundle: ServedBundle, running: Orchestrator, nodes: Sequence[LocalNode]
) -> None:
    """One line when requests can be served: with local nodes, as soon as all of them are there."""
    model = bundle.index.model.id
    if not nodes:
        print(f"{model} on {running.address}, waiting for nodes to join", flush=True)
        _write_ready_file(config.ready_file, running.address)
    await _wait_for_nodes(running, {node.node_id for node in nodes})
    ready = [f"{node.profile.node_id} ({node.profile.role})" for node in running.driver.core.state.nodes.ready()]
    print(f"serving {model} on {running.address} with {', '.join(ready)}", flush=True)
    _write_ready_file(config.ready_file, running.address)


async def _wait_for_nodes(running: Orchestrator, wanted: set[str]) -> None:
    while True:
        changed = running.driver.changed
        here = {node.profile.node_id for node in running.driver.core.state.nodes.ready()}
        if wanted <= here and can_serve(running.driver):
            return
        await changed.wait()


def _write_ready_file(path: Path | None, address: str) -> None:
    """Appears whole or not at all."""
    if path is None:
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(msgspec.json.encode({"address": address, "pid": os.getpid()}))
        partial.replace(path)
    except OSError as error:
        raise ReadyFileError(f"cannot write --ready-file {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
