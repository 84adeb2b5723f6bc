"""One process's worth of orchestrator: core, driver, and the gRPC server with all its services."""

import contextlib
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edgellm.orchestrator.background import beside
from edgellm.orchestrator.bundle import ServedBundle
from edgellm.orchestrator.cluster_server import ClusterServicer
from edgellm.orchestrator.core.config import CoreConfig
from edgellm.orchestrator.core.core import Core
from edgellm.orchestrator.core.pipelines import form_pipelines
from edgellm.orchestrator.core.policy import Policy
from edgellm.orchestrator.driver import Driver
from edgellm.orchestrator.gateway import InferenceServicer
from edgellm.orchestrator.journal import Written
from edgellm.orchestrator.journal_writer import Journal
from edgellm.orchestrator.metrics import Metrics
from edgellm.orchestrator.tokenizer import load_tokenizer
from edgellm.orchestrator.undecodable import RefuseUndecodable
from edgellm.orchestrator.validation import RequestReader
from edgellm.runtime.rpc import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

STOP_GRACE_S = 0.5
LAST_PORT = 65535
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["Cluster"].full_name

_SERVER_OPTIONS = [("grpc.so_reuseport", 0), ("grpc.http2.max_ping_strikes", 0)]
"""Nodes and clients may ask as often as they like whether the connection still stands."""

SetStatus = Callable[[str, "health_pb2.HealthCheckResponse.ServingStatus.ValueType"], Awaitable[None]]


class ListenError(RuntimeError):
    """The address cannot be listened on."""


@dataclass(frozen=True, kw_only=True)
class Orchestrator:
    """A running orchestrator."""

    driver: Driver
    address: str
    """Where it listens, with the port the system chose where 0 was asked for."""


EPOCH_ZERO_UNIX_S = 1_767_225_600
EPOCHS_PER_S = 16
"""Where neither a journal nor a node knows the epochs before, those of a restarted orchestrator still lie above them if
the clock went right, and if attempts started no faster than this on average."""


def core_config(bundle: ServedBundle) -> CoreConfig:
    """The facts of a bundle with the default bounds."""
    return CoreConfig(
        bundle_sha256=bundle.sha256,
        kv_contract_sha256=bundle.index.kv.sha256,
        num_layers=bundle.index.model.num_layers,
        block_tokens=bundle.index.kv.block_tokens,
        stages=bundle.index.plan.stages,
        first_epoch=max(0, int(EPOCHS_PER_S * (time.time() - EPOCH_ZERO_UNIX_S))),
    )


@contextlib.asynccontextmanager
async def run_orchestrator(
    bundle: ServedBundle,
    config: CoreConfig,
    policy: Policy,
    listen: str,
    *,
    journal: Journal | None = None,
    written: Iterable[Written] = (),
) -> AsyncIterator[Orchestrator]:
    """Serve until the block is left. `written` is what the journal already had: its requests go on.

    Raises ListenError if `listen` is taken, BundleError for a broken tokenizer.
    """
    driver = Driver(Core(config, policy), Metrics(), time.monotonic, journal)
    reader = RequestReader(
        model=bundle.index.model,
        tokenizer=load_tokenizer(bundle.folder / "tokenizer"),
        new_request_id=lambda: uuid.uuid4().hex,
        new_seed=lambda: secrets.randbits(63),
    )
    server = grpc.aio.server(options=_SERVER_OPTIONS, interceptors=[RefuseUndecodable()])
    cluster_pb2_grpc.add_ClusterServicer_to_server(ClusterServicer(driver), server)
    inference = InferenceServicer(driver, bundle, reader)
    inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
    inference.answers.recover(written)
    set_status = _add_health_and_reflection(server)
    address = _listen(server, listen)
    await server.start()
    try:
        async with beside(driver.run_ticks(), _report_health(driver, set_status)):
            yield Orchestrator(driver=driver, address=address)
    finally:
        await inference.stop()
        await server.stop(STOP_GRACE_S)


def _add_health_and_reflection(server: grpc.aio.Server) -> SetStatus:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    names = (INFERENCE, CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    set_status: SetStatus = servicer.set
    return set_status


def _listen(server: grpc.aio.Server, listen: str) -> str:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LAST_PORT:
        raise ListenError(f"--listen {listen!r} must be host:port, with a port of at most {LAST_PORT}")
    problem = f"cannot listen on {listen}: is the port in use? Choose another with --listen"
    try:
        with socket.create_server((host, int(port))):
            pass  # asked first, because gRPC logs a failure in several lines of its own
        return f"{host}:{server.add_insecure_port(listen)}"
    except (OSError, RuntimeError) as error:
        raise ListenError(f"{problem} ({error})") from error


async def _report_health(driver: Driver, set_status: SetStatus) -> None:
    """SERVING while a prompt can be read and answered at full quality."""
    while True:
        changed = driver.changed
        serving = can_serve(driver)
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", INFERENCE):
            await set_status(service, status)
        await changed.wait()


def can_serve(driver: Driver) -> bool:
    """Whether a half-precision prefill engine is alive, and some pipeline carries every stage."""
    state = driver.core.state
    cut = state.config.cut
    reads = any(node.can_prefill(state.config.num_layers) for node in state.nodes.alive())
    return reads and bool(form_pipelines(state.nodes.carriers(cut), cut))
