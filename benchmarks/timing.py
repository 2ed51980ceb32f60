"""Interleaved repetitions in one process."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

# A sample is a loop of so long. A single call would measure the clock's own cost, and which of the
# memory that the other peers have just given back the allocator hands out; the arrays of longer
# calls are beyond any cache.
SAMPLE_SECONDS = 5e-3
# Threads that wait for the next parallel region spin, and disturb whoever brings his own threads.
SPIN_SECONDS = 3e-3


@dataclass(frozen=True)
class Budget:
    """How long one case may take."""

    seconds: float
    repetitions: int = 7  # at least, however long they take
    most: int = 400


def interleave(
    calls: Mapping[str, Call],
    budget: Budget,
    *,
    grad: bool = True,
    own_threads: frozenset[str] = frozenset(),
) -> dict[str, list[float]]:
    """Seconds a call of each, repetition by repetition; every repetition calls all in turn.

    The order is drawn anew each time, from a fixed seed, so that nobody always follows the same
    other. A sample is a loop of `SAMPLE_SECONDS`, after a call of the same peer that isn't timed
    and brings its code and data back into the caches; where nobody's call is shorter, it is one
    call. Those named in `own_threads` bring a thread pool of their own and start after the
    others' threads have gone to sleep.
    """
    names = list(calls)
    with torch.set_grad_enabled(grad):
        once = {name: _seconds_of(calls[name]) for name in names}
        inner = {name: max(1, round(SAMPLE_SECONDS / once[name])) for name in names}
        in_loops = min(once.values()) < SAMPLE_SECONDS
        samples: dict[str, list[float]] = {name: [] for name in names}
        gc.collect(
            1
        )  # of what the case before left; a full collection takes longer than most cases
        order = random.Random(0)
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            end = time.perf_counter() + budget.seconds
            for repetition in range(budget.most):
                if repetition >= budget.repetitions and time.perf_counter() > end:
                    break
                for name in order.sample(names, len(names)):
                    if name in own_threads:
                        time.sleep(SPIN_SECONDS)
                    if in_loops:
                        calls[name]()
                    samples[name].append(_sample(calls[name], inner[name]))
        finally:
            if was_enabled:
                gc.enable()
    return samples


def _sample(call: Call, inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return (time.perf_counter() - start) / inner


def _seconds_of(call: Call) -> float:
    """About, after warming up: what is built at the first call is not what is measured."""
    call()
    call()
    once = _sample(call, 1)
    return min(once, _sample(call, 20)) if once < SAMPLE_SECONDS / 20 else once
