"""Starts processes of one torch.distributed group over gloo on this machine's loopback device.

The processes are started afresh, so that what they do does not depend on the threads and libraries
of the process that runs the tests. Whatever hangs is ended after a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# Until a process is given up. A group of four takes a quarter of it on a busy machine of two cores.
SECONDS = 120

_PROGRAM = (
    "import runpy, sys; names = runpy.run_path(sys.argv[1]); "
    "names[sys.argv[2]](int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])"
)


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
            process.kill()
            process.wait()
    return ended


def run_well(*arguments: object, **named: object) -> None:
    """The same for processes that are to end well."""
    for ended in run(*arguments, **named):  # type: ignore[arg-type]
        assert ended.status == 0, ended.errors[-3000:]


def join(rank: int, world: int, directory: str, seconds: float = SECONDS / 2) -> None:
    """In such a process: become a member of the group."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
