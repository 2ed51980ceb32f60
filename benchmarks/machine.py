"""What a result was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path
from typing import Any

import torch

import torch_bn


def processors() -> int:
    """How many this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """As the kernel calls it; arm64 has no such line, and platform's word must do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()


def caches() -> dict[str, str]:
    """Level and type to size, of processor 0."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        found[f"L{level} {kind}"] = size
    return found


def environment() -> dict[str, Any]:
    """Everything that a figure depends on and that is not a setting of the run."""
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "processors": processors(),
        "caches": caches(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_bn": dict(torch_bn.build_info()),
        "isa": torch_bn.build_info()["isa"],
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "OMP": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "KMP_"))},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def busy(environment: dict[str, Any]) -> str:
    """A warning in words when other programs were running at the start, or nothing."""
    load = environment["load_average"]
    if load < 0.5:
        return ""
    return (
        f"The load average was {load:.1f} at the start: if that was of other programs, the times "
        "with all threads say little, because the threads of a team wait for each other."
    )


def one_line(environment: dict[str, Any]) -> str:
    """For captions."""
    return (
        f"{environment['cpu']}, {environment['processors']} processors, torch "
        f"{environment['torch']}, {environment['isa']} kernels, {environment['date'][:10]}"
    )
