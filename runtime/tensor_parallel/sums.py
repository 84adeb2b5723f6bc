"""Sums over the ranks, by torch.distributed with gloo: the only module of a node that needs torch."""

import logging
from datetime import timedelta
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from edgellm.engines.spec import EngineSpec
from edgellm.runtime.config import NodeError
from edgellm.runtime.host import address_towards
from edgellm.runtime.tensor_parallel.patience import Patience

_dist: Any = dist  # which does not say what it exports
_gloo = _dist.ProcessGroupGloo

Store: TypeAlias = Any
"""A torch.distributed.TCPStore."""
_ANY_PORT: Final = 0

_log = logging.getLogger(__name__)


def open_store(leader: str, patience: Patience) -> Store:
    """On rank 0's host, part of `leader`: where the ranks find each other. Its `port` is told to the others."""
    return _store(leader, _ANY_PORT, patience, is_master=True)


def join_store(leader: str, port: int, patience: Patience) -> Store:
    """On the other ranks. Raises NodeError."""
    return _store(leader, port, patience, is_master=False)


def connect(store: Store, spec: EngineSpec, leader: str, patience: Patience) -> "GlooSum":
    """For one rank's engine: waits until all ranks are here. Raises NodeError."""
    return GlooSum(
        store,
        rank=spec.rank,
        world=spec.world,
        address=address_towards(leader),
        max_values=spec.limits.max_rows * spec.hidden_size,
        patience=patience,
    )


class GlooSum:
    """`SumOverRanks` of one rank.

    Every rank gathers all parts, and adds them in rank order. Gloo's own all-reduce cuts a tensor by its size and adds
    up each piece in another order, so that a row's bits would depend on how many rows go with it. With two ranks both
    move as many bytes.
    """

    def __init__(
        self, store: Store, *, rank: int, world: int, address: str, max_values: int, patience: Patience
    ) -> None:
        """Waits until all ranks are here. `address`: of this host, as the other ranks reach it. `max_values`: of the
        largest tensor. Raises NodeError if a rank does not come."""
        self._own = torch.empty(max_values)
        self._gathered = torch.empty(world, max_values)
        try:
            self._group = _gloo(store, rank, world, _options(address, patience))
        except RuntimeError as error:
            raise NodeError(f"rank {rank} of {world} did not meet the others: {_first_line(error)}") from error

    def __call__(self, x: npt.NDArray[np.float32]) -> None:
        """Raises NodeError when a rank has gone, or does not come to this sum."""
        own, gathered = self._own[: x.size], self._gathered[:, : x.size]
        own.numpy().reshape(x.shape)[...] = x
        try:
            self._group.allgather([list(gathered)], [own]).wait()
        except RuntimeError as error:
            _log.warning("sum over ranks failed reason=%s", _first_line(error))
            raise NodeError("a tensor-parallel rank has gone, or hangs; all ranks must start again") from error
        parts = [part.numpy().reshape(x.shape) for part in gathered]
        np.add(parts[0], parts[1], out=x)
        for part in parts[2:]:
            np.add(x, part, out=x)


def _store(leader: str, port: int, patience: Patience, *, is_master: bool) -> Store:
    host, timeout = leader.rpartition(":")[0], timedelta(seconds=patience.connect_s)
    try:
        return _dist.TCPStore(host, port, is_master=is_master, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise NodeError(f"the ranks cannot meet at {host}, port {port}: {_first_line(error)}") from error


def _options(address: str, patience: Patience) -> Any:
    """Gloo left to itself listens where the host's own name leads, which is often a loopback address."""
    options = _gloo._Options()
    options._devices = [_gloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=patience.sum_s)
    return options


def _first_line(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]
