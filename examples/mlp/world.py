"""The processes that train together, as torchrun has started them; one alone otherwise."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Its functions have the default group as default argument: imported later, as
# DistributedDataParallel does, it would hold the group for ever.
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlp.model import generator

T = TypeVar("T")


class JoinError(Exception):
    """The processes could not be brought together; the message says why."""


def processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class World:
    """This process among those that train together. Rank 0 prints and saves for all."""

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This process's part of `count` rows: as equal as possible, in the order of the ranks."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model with its gradients averaged over the processes."""
        return model if self.size == 1 else DistributedDataParallel(model)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true in any process; the same answer in all."""
        return bool(self.sum(torch.tensor(int(value))))

    def from_main(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, in all processes; what it raises, in all too."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.main:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        result: T = found[0]
        return result

    def main_first(self, make: Callable[[], T]) -> T:
        """What each process makes for itself, after rank 0 has done so."""
        if self.size == 1:
            return make()
        if self.main:
            try:
                return make()
            finally:
                dist.barrier()
        dist.barrier()
        return make()


def _join(backend: str) -> None:
    if backend == "mpi" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        dist.init_process_group(backend)
        return
    # torchrun keeps its store when it starts the processes again, with the addresses of those
    # that have ended in it. On several hosts the counts may differ: see docs/distributed.md.
    store, rank, size = next(iter(dist.rendezvous("env://")))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


@contextmanager
def world(seed: int, backend: str) -> Iterator[World]:
    """The world that torchrun describes in the environment, joined while the block runs.

    Each process's default generator gets a seed of its own: what it draws, as for dropout, is
    independent of the others. Nothing else depends on it; weights and batches come from the
    generators of their own seeds, the same in every process.

    Raises:
        JoinError: if `backend` is unknown or unusable here, or the others cannot be reached.
    """
    if processes() == 1:
        yield World()
        return
    try:
        _join(backend)
    except (RuntimeError, AssertionError, ValueError) as error:  # whatever the backend raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise JoinError(f"the processes cannot be joined by '{backend}': {reason[0]}") from error
    joined = World(dist.get_rank(), dist.get_world_size())
    torch.manual_seed(generator("rank", seed, joined.rank).initial_seed())
    try:
        yield joined
    finally:
        # Gloo's threads free tensors of Python some time after a collective has returned, and end
        # the process with an abort if Python itself has ended meanwhile. They are waited for where
        # the group goes, but that is not before the last model that holds it, often in a cycle.
        gc.collect()
        dist.destroy_process_group()
