"""Starts processes of one torch.distributed group over gloo on this machine's loopback device.

The processes are started afresh, so that what they do does not depend on the threads and libraries
of the process that runs the tests. Whatever hangs is ended after a time.
"""

from __future__ import annotations

import gc
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Imported later, as by DistributedDataParallel, it would hold the group in its default arguments.
import torch.distributed.nn.functional

# Until a process is given up. The slowest take half a minute on a busy machine of two cores.
SECONDS = 240

_PROGRAM = "import processes, sys; processes.call(*sys.argv[1:])"


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status and what it wrote."""

    status: int
    output: str
    errors: str


def run(
    file: str, function: str, world: int, directory: Path, environment: dict[str, str] | None = None
) -> list[Ended]:
    """Call `function(rank, world, directory)` of a test file in `world` processes."""
    # Gloo finds its address by the host's name, which need not resolve: the loopback device does.
    settings = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
        **(environment or {}),
    }
    command = [sys.executable, "-W", "ignore", "-c", _PROGRAM, file, function]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(directory)],
            env=settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=SECONDS)
            ended.append(Ended(process.returncode, output, errors))
    finally:
        for process in processes:
            with process:  # closes its pipes
                process.kill()
    return ended


def call(file: str, function: str, rank: str, world: str, directory: str) -> None:
    """What such a process does. Its group is ended last, when nothing else holds it.

    Then its threads are waited for; one that frees a tensor while Python ends aborts the process.
    """
    runpy.run_path(file)[function](int(rank), int(world), directory)
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def run_well(*arguments: object, **named: object) -> None:
    """The same for processes that are to end well."""
    for ended in run(*arguments, **named):  # type: ignore[arg-type]
        assert ended.status == 0, ended.errors[-3000:]


def join(rank: int, world: int, directory: str, seconds: float = 60) -> None:
    """In such a process: become a member of the group."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
