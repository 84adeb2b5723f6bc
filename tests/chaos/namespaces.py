"""Network namespaces on this machine: each process has an address and a link of its own."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

NETWORK = "10.213.77"
SWITCH_ADDRESS = f"{NETWORK}.1"
NOBODY = "02:00:00:00:00:01"
"""A hardware address that no interface has: what is sent there is lost without a word."""


class NotPermittedError(Exception):
    """Namespaces cannot be made here; the message says why."""


@dataclass(frozen=True)
class Host:
    """One namespace on the switch."""

    name: str
    address: str

    @property
    def namespace(self) -> str:
        return f"edgellm-{os.getpid()}-{self.name}"

    @property
    def port(self) -> str:
        """Its end on the switch; the name of an interface has 15 characters at most."""
        return f"e{os.getpid()}{self.address.rpartition('.')[2]}"

    @property
    def starter(self) -> list[str]:
        """A command before this one runs in the namespace, and becomes the process."""
        return ["ip", "netns", "exec", self.namespace]

    def run(self, *arguments: str) -> None:
        _ip("-n", self.namespace, *arguments)


@dataclass(frozen=True)
class Network:
    """Hosts by name. This process is on the switch itself."""

    hosts: dict[str, Host] = field(default_factory=dict)

    def unplug(self, name: str) -> None:
        """Nothing goes in or out any more."""
        _ip("link", "set", self.hosts[name].port, "down")

    def lose(self, sender: str, receiver: str) -> None:
        """Nothing arrives from one at the other; what goes the other way does."""
        self.hosts[sender].run(
            "neigh", "replace", self.hosts[receiver].address, "lladdr", NOBODY, "nud", "permanent", "dev", "eth0"
        )

    def heal(self) -> None:
        for host in self.hosts.values():
            _ip("link", "set", host.port, "up")
            host.run("neigh", "flush", "dev", "eth0", "nud", "permanent")


@contextmanager
def network(names: Iterable[str]) -> Iterator[Network]:
    """A host for each name. Raises NotPermittedError."""
    if shutil.which("ip") is None:
        raise NotPermittedError("the command ip is missing; apt install iproute2")
    switch = f"e{os.getpid()}sw"
    with ExitStack() as stack:
        _made(stack, ("link", "add", switch, "type", "bridge"), ("link", "del", switch))
        _ip("addr", "add", f"{SWITCH_ADDRESS}/24", "dev", switch)
        _ip("link", "set", switch, "up")
        hosts = {name: Host(name, f"{NETWORK}.{number}") for number, name in enumerate(names, 2)}
        for host in hosts.values():
            _plug_in(stack, host, switch)
        yield Network(hosts)


def _plug_in(stack: ExitStack, host: Host, switch: str) -> None:
    _made(stack, ("netns", "add", host.namespace), ("netns", "del", host.namespace))
    _ip("link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", host.port, "master", switch, "up")
    host.run("addr", "add", f"{host.address}/24", "dev", "eth0")
    host.run("link", "set", "eth0", "up")
    host.run("link", "set", "lo", "up")


def _made(stack: ExitStack, making: tuple[str, ...], unmaking: tuple[str, ...]) -> None:
    """Raises NotPermittedError."""
    try:
        _ip(*making)
    except subprocess.CalledProcessError as error:
        raise NotPermittedError(f"`ip {' '.join(making)}` says: {error.stderr.strip()}") from error
    stack.callback(_ip, *unmaking)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
