"""Proxies on every way between the processes of a cluster, in a thread of their own."""

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from edgellm.orchestrator.process_cluster import free_port
from tests.runtime.proxy import Proxy, proxied

_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class Links:
    client: Proxy
    """Between the client and the orchestrator."""
    joins: dict[str, Proxy]
    """From each node to the orchestrator."""
    exchanges: dict[str, Proxy]
    """From other nodes to each node: KV, copies, and steps."""

    def options(self, node: str) -> list[str]:
        """Of edgellm-node, so that it dials and is dialled through its proxies."""
        exchange = self.exchanges[node]
        join = ["--orchestrator", self.joins[node].address]
        return [*join, "--listen", exchange.target, "--advertise", exchange.address]

    def lead_to(self, orchestrator: str) -> None:
        for proxy in (self.client, *self.joins.values()):
            proxy.target = orchestrator

    def heal(self) -> None:
        for proxy in (self.client, *self.joins.values(), *self.exchanges.values()):
            proxy.heal()


@contextmanager
def links_between(nodes: Iterable[str]) -> Iterator[Links]:
    """Where the orchestrator is, is told later by `lead_to`."""
    with _loop_in_a_thread() as loop:
        stack = AsyncExitStack()

        def wait_for(work: Coroutine[Any, Any, _Result]) -> _Result:
            return asyncio.run_coroutine_threadsafe(work, loop).result(20)

        def proxy(target: str) -> Proxy:
            return wait_for(stack.enter_async_context(proxied(target)))

        try:
            yield Links(
                client=proxy(""),
                joins={name: proxy("") for name in nodes},
                exchanges={name: proxy(f"127.0.0.1:{free_port()}") for name in nodes},
            )
        finally:
            wait_for(stack.aclose())


@contextmanager
def _loop_in_a_thread() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
