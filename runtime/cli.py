"""The edgellm-node command."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from edgellm.engines.bundle import BundleError, engine_spec
from edgellm.runtime.config import JoinConfig, NodeConfig, NodeError
from edgellm.runtime.kv.codecs import CodecChoice
from edgellm.runtime.kv.copying.queue import CopyCodec, CopyConfig
from edgellm.runtime.kv.types import NodeId
from edgellm.runtime.loading import is_rank, load_engines
from edgellm.runtime.server import NodeServer
from edgellm.runtime.tensor_parallel.start import serve_rank


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until it is stopped; 0, or 1 with one line on stderr."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # its own lines tell of every stream that somebody ended
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        asyncio.run(_serve(_config(options)))
    except NodeError as error:
        print(f"edgellm-node: {error}", file=sys.stderr)
        return 1
    except BundleError as error:
        _refuse(error, options.refusal_fd)
        return 1
    return 0


def _refuse(error: BundleError, refusal_fd: int | None) -> None:
    """Tell whoever started this node, who needs not try again; else the person at the terminal."""
    if refusal_fd is None:
        print(f"edgellm-node: {error}", file=sys.stderr)
    else:
        os.write(refusal_fd, str(error).encode())


async def _serve(config: NodeConfig) -> None:
    spec = engine_spec(config.bundle, config.engine)
    if not config.join.orchestrator and not (is_rank(spec) and spec.rank):
        raise NodeError("say --orchestrator HOST:PORT, where edgellm-serve listens")
    if is_rank(spec):
        await serve_rank(config, spec)
        return
    if config.tp_leader is not None:
        raise NodeError(f"engine {spec.name} is not one of several ranks; leave out --tp-leader")
    server = NodeServer(config, load_engines(config))
    server.stop_on_signals()
    await server.run()


def _config(options: argparse.Namespace) -> NodeConfig:
    return NodeConfig(
        node_id=NodeId(options.node_id),
        bundle=options.bundle.expanduser().resolve(),
        engine=options.engine,
        spare=options.spare,
        join=JoinConfig(
            orchestrator=options.orchestrator or "", join_timeout_s=options.join_timeout, lease_s=options.lease
        ),
        listen=options.listen,
        advertise=options.advertise,
        kv_blocks=options.kv_blocks,
        device_class=options.device_class,
        threads=options.threads,
        metrics_port=options.metrics_port,
        kv_codec=options.kv_codec,
        copies=CopyConfig(codec=options.copy_codec),
        allow_shm=not options.no_shm,
        tp_leader=options.tp_leader,
        parent_pid=os.getppid() if options.exit_with_parent else None,
    )


def _parser() -> argparse.ArgumentParser:
    join, parser = JoinConfig, argparse.ArgumentParser(prog="edgellm-node", description="Serve one engine of a bundle.")
    add = parser.add_argument
    add("--orchestrator", metavar="HOST:PORT", type=_address, help="not for rank 1 and up of an engine")
    add("--bundle", required=True, metavar="DIR", type=Path)
    add("--engine", required=True, metavar="NAME", help="an engine folder of the bundle; its phase decides the role")
    add("--node-id", required=True, metavar="ID")
    add("--spare", action="store_true", help="take no requests: hold copies of KV, and take over when a node dies")
    add("--listen", default=NodeConfig.listen, metavar="HOST:PORT", type=_address, help="for KV (default %(default)s)")
    add("--advertise", metavar="HOST:PORT", type=_address, help="what other nodes dial, if a port is forwarded here")
    add("--tp-leader", metavar="HOST:PORT", type=_address, help="of rank 0, for an engine of several ranks")
    add("--kv-blocks", metavar="N", type=_positive, help="of 32 tokens (default: the bundle's plan)")
    add("--device-class", metavar="NAME", help="of this machine, such as orin-nano-8gb (default: as found)")
    add("--threads", metavar="N", type=_positive, help="of the engine (default: its choice)")
    add("--kv-codec", default=NodeConfig.kv_codec, choices=get_args(CodecChoice), help="(default %(default)s)")
    add(
        "--copy-codec",
        default=CopyConfig.codec,
        choices=get_args(CopyCodec),
        help="of copies; what is written after a takeover from int8 may differ (default %(default)s)",
    )
    add("--no-shm", action="store_true", help="send KV over gRPC on the same host too")
    add("--metrics-port", metavar="N", type=int, help="for Prometheus (default: none)")
    add("--join-timeout", default=join.join_timeout_s, metavar="SECONDS", type=float, help="(default %(default)s)")
    add("--lease", default=join.lease_s, metavar="SECONDS", type=float, help="to rejoin in (default %(default)s)")
    add("--exit-with-parent", action="store_true", help="exit when the process that started this one has ended")
    add("--refusal-fd", metavar="FD", type=int, help="an open file: why the bundle cannot be run here goes there")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
