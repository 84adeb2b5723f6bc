"""Contenders as running drivers with a model loaded."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.pairs import DECODE_32, MAX_STEPS, Scenario
from bench.peers.contenders import DRIVERS, Contender, model_path
from bench.peers.environments import Environments
from bench.peers.models import Model, ModelStore
from bench.peers.process import DriverProcess, started
from edgellm.engines.cpu.compiler import WEIGHTS_FILE

MAX_BATCH: Final = DECODE_32.batch
KV_TOKENS: Final = MAX_BATCH * (DECODE_32.context + 2 * MAX_STEPS)
"""Room in every engine's KV cache."""
_READ_BYTES: Final = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A contender that is ready to run."""

    contender: Contender
    process: DriverProcess
    load_s: float
    scheduler: str
    weight_bytes: int
    """Of all its files."""

    def run(self, scenario: Scenario, steps: int) -> float:
        """Seconds of one run."""
        if scenario.phase == "prefill":
            return float(self.process.ask(do="prefill", tokens=scenario.context)["seconds"])
        reply = self.process.ask(do="decode", batch=scenario.batch, context=scenario.context, steps=steps)
        return float(reply["seconds"])


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Starts drivers, each in its contender's environment and with its contender's files."""

    threads: int
    real_time: bool
    environments: Environments
    store: ModelStore
    say: Callable[[str], None]

    @classmethod
    def telling(cls, say: Callable[[str], None], *, threads: int, real_time: bool) -> "Loader":
        """With environments and models of its own, which tell what they do by the same `say`."""
        environments, store = Environments(say), ModelStore(say)
        return cls(threads=threads, real_time=real_time, environments=environments, store=store, say=say)

    @contextlib.contextmanager
    def loaded(self, contender: Contender, model: Model) -> Iterator[Loaded]:
        """A driver that ends with the block. Raises UnavailableError."""
        environment = self.environments.prepare(contender.environment)
        path = model_path(self.store, contender, model, environment)
        self.say(f"{contender.name} on {model.name}: loading")
        _place_anew(path)
        with started(environment, DRIVERS / contender.driver) as process:
            reply = process.ask(
                do="load",
                model=str(path),
                phases=contender.phases,
                threads=self.threads,
                max_batch=MAX_BATCH,
                kv_tokens=KV_TOKENS,
                vocab_size=model.vocab_size,
                real_time=self.real_time,
            )
            yield Loaded(
                contender=contender,
                process=process,
                load_s=reply["load_s"],
                scheduler=reply["scheduler"],
                weight_bytes=_weight_bytes(path),
            )


def _place_anew(path: Path) -> None:
    """Drops a contender's files from the page cache and reads them again.

    A virtual machine's memory is not all alike: the same weights were read a third slower where they happened to lie
    badly, and would be in every run, while a contender that copies its weights gets another place each time.
    """
    for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
        with file.open("rb", buffering=0) as cached:
            os.fsync(cached.fileno())
            os.posix_fadvise(cached.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while cached.read(_READ_BYTES):
                pass


def _weight_bytes(path: Path) -> int:
    """Of our engine's packed weights; for peers, all files."""
    if path.is_file():
        return path.stat().st_size
    packed = path / WEIGHTS_FILE
    files = [packed] if packed.exists() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
