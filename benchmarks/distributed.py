"""Measures SyncBatchNorm1d in 1, 2 and 4 processes of this machine.

As root it runs in a network namespace of its own, where every byte of the loopback device is ours.
Prints the table, and with --docs writes it and the plot into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

import torch_bn

from .files import written_beside
from .page import replace_in

ROWS = 64
BEGIN = "<!-- BEGIN measured: written by python -m benchmarks.distributed --docs docs -->"
END = "<!-- END measured -->"


@dataclass(frozen=True)
class Extent:
    """What is measured, and how often."""

    channels: tuple[int, ...] = (100, 300, 1024, 4096)
    worlds: tuple[int, ...] = (1, 2, 4)
    repetitions: int = 81


QUICK = Extent(channels=(100, 1024), worlds=(1, 2), repetitions=5)


@dataclass(frozen=True)
class Row:
    """Medians of one number of processes and channels; seconds, and bytes of all processes."""

    world: int
    channels: int
    local_layer: float
    sync_layer: float
    local_and_collectives: float
    gather: float
    reduce: float
    local_step: float
    sync_step: float
    layer_bytes: float

    @property
    def added(self) -> float:
        return self.sync_layer - self.local_layer

    @property
    def allowed(self) -> float:
        """What a gather and an all-reduce add to a local layer's step, and a fifth."""
        return 1.2 * (self.local_and_collectives - self.local_layer)

    @property
    def alone(self) -> float:
        """A gather's and an all-reduce's time right after a barrier, and a fifth."""
        return 1.2 * (self.gather + self.reduce)


def loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise RuntimeError("there is no loopback device")


def nothing() -> None:
    pass


def layer_step(
    layer: torch.nn.Module,
    channels: int,
    forward: Callable[[], None] = nothing,
    backward: Callable[[], None] = nothing,
) -> Callable[[], None]:
    """A forward and backward, with something done in each besides."""
    x = torch.randn(ROWS, channels, requires_grad=True)
    g = torch.randn(ROWS, channels)

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        y = layer(x)
        forward()
        y.backward(g)
        backward()

    return step


def model_step(layer: torch.nn.Module, channels: int, world: int) -> Callable[[], None]:
    """Of a Linear, the layer, a ReLU and a Linear, under DDP."""
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(64, channels, bias=False),
        layer,
        torch.nn.ReLU(),
        torch.nn.Linear(channels, 10),
    )
    if world > 1:
        model = DistributedDataParallel(model)
    x = torch.randn(ROWS, 64)

    def step() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return step


def collective(name: str, channels: int, world: int) -> Callable[[], None]:
    """A message of the layer's size, straight through torch."""
    group = dist.group.WORLD.group_name
    functional = torch.ops._c10d_functional
    part = torch.zeros(2 + 2 * channels, dtype=torch.double)
    arguments = (part, world, group) if name == "all_gather_into_tensor" else (part, "sum", group)
    operator = getattr(functional, name)

    def call() -> None:
        functional.wait_tensor(operator(*arguments))

    return call


def interleaved(calls: dict[str, Callable[[], None]], repetitions: int) -> dict[str, float]:
    """Medians of the calls, one after the other in turn; all processes start each together."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in samples.items()}


def work(rank: int, world: int, directory: str, extent: Extent) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{directory}/store{world}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    rows = []
    for channels in extent.channels:
        local, sync = torch_bn.BatchNorm1d(channels), torch_bn.SyncBatchNorm1d(channels)
        gather = collective("all_gather_into_tensor", channels, world)
        reduce = collective("all_reduce", channels, world)
        calls = {
            "local_layer": layer_step(local, channels),
            "sync_layer": layer_step(sync, channels),
            "local_and_collectives": layer_step(local, channels, gather, reduce),
            "gather": gather,
            "reduce": reduce,
            "local_step": model_step(torch_bn.BatchNorm1d(channels), channels, world),
            "sync_step": model_step(torch_bn.SyncBatchNorm1d(channels), channels, world),
        }
        found = interleaved(calls, extent.repetitions)
        dist.barrier()
        time.sleep(0.1)  # late bytes of the barrier
        before = loopback_bytes()
        for _ in range(extent.repetitions):
            calls["sync_layer"]()
        time.sleep(0.1)
        sent = (loopback_bytes() - before) / extent.repetitions
        rows.append(Row(world, channels, layer_bytes=sent, **found))
    if rank == 0:
        Path(directory, f"{world}.json").write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    dist.destroy_process_group()


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"


def markdown(rows: list[Row]) -> str:
    lines = [
        "| processes | C | layer, local BN | layer, sync | sync adds | gather + all-reduce in its "
        "place, and a fifth | alone, and a fifth | DDP step, local BN | DDP step, sync | bytes of "
        "a layer step | of these values |",
        "| ---: " * 11 + "|",
    ]
    for row in rows:
        values = 2 * row.world * (row.world - 1) * 8 * (2 + 2 * row.channels)
        figures = (row.local_layer, row.sync_layer, row.added, row.allowed, row.alone)
        steps = (row.local_step, row.sync_step)
        lines.append(
            f"| {row.world} | {row.channels} | "
            + " | ".join(microseconds(figure) for figure in (*figures, *steps))
            + f" | {row.layer_bytes:,.0f} | {values:,} |"
        )
    return "\n".join(lines)


def model_seconds(world: int, channels: int, latency: float, bandwidth: float) -> float:
    """Two gathers in a ring: world - 1 steps, each with a neighbour's part."""
    return 2 * (world - 1) * (latency + 8 * (2 + 2 * channels) / bandwidth)


def fitted(rows: list[Row]) -> tuple[float, float]:
    """Latency and bytes per second of a step of the ring, from the gathers of two processes."""
    two = [row for row in rows if row.world == 2]
    line = statistics.linear_regression(
        [8 * (2 + 2 * row.channels) for row in two], [row.gather for row in two]
    )
    # Where bytes cost less than the noise, their price is taken as small, not as negative.
    return line.intercept, 1 / max(line.slope, 1e-11)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    latency, bandwidth = fitted(rows)
    worlds = [2**i for i in range(1, 10)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for number, channels in enumerate(dict.fromkeys(row.channels for row in rows)):
        colour = f"C{number}"
        times = [1e3 * model_seconds(n, channels, latency, bandwidth) for n in worlds]
        right.plot(worlds, times, color=colour, label=f"C = {channels}")
        ethernet = [1e3 * model_seconds(n, channels, 50e-6, 1.25e9) for n in worlds]
        right.plot(worlds, ethernet, color=colour, linestyle=":")
        found = [row for row in rows if row.channels == channels and row.world > 1]
        right.plot(
            [row.world for row in found], [1e3 * row.added for row in found], "o", color=colour
        )
        sent = [2 * (n - 1) * 8 * (2 + 2 * channels) / 1e3 for n in worlds]
        left.plot(worlds, sent, color=colour, label=f"C = {channels}")
        measured = [row.layer_bytes / row.world / 1e3 for row in found]
        left.plot([row.world for row in found], measured, "o", color=colour)
    left.set(title="Sent by each process, per layer and step", ylabel="kB")
    right.set(title="Time that synchronising adds, per layer and step", ylabel="ms")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="processes in the group")
        axes.set_xticks(worlds, [str(n) for n in worlds])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=110)


def in_own_network(arguments: list[str]) -> int | None:
    """The same command where nobody else uses the loopback device; None where that is refused."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or "BN_OWN_NETWORK" in os.environ:
        return None
    command = 'ip link set lo up && exec "$@"'
    again = [sys.executable, "-m", "benchmarks.distributed", *arguments]
    environment = {**os.environ, "BN_OWN_NETWORK": "1"}
    probe = ["unshare", "-n", "sh", "-c", command, "-"]
    if subprocess.run([*probe, "true"], capture_output=True).returncode != 0:
        return None
    return subprocess.run([*probe, *again], env=environment).returncode


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--docs", type=Path, help="folder of distributed.md and its plot")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it works")
    chosen = parser.parse_args(arguments)
    if chosen.docs:
        try:
            text = (chosen.docs / "distributed.md").read_text()
        except OSError as error:
            parser.error(f"--docs: {error}")
        if not -1 < text.find(BEGIN) < text.find(END):
            parser.error(f"--docs: the page needs {BEGIN!r} and after it {END!r}")
    extent = QUICK if chosen.quick else Extent()
    status = in_own_network(arguments)
    if status is not None:
        return status
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for world in extent.worlds:
            torch.multiprocessing.spawn(work, (world, directory, extent), nprocs=world)
            rows += [Row(**row) for row in json.loads(Path(directory, f"{world}.json").read_text())]
    table = markdown(rows)
    latency, bandwidth = fitted(rows)
    fit = (
        f"A step of the ring between two processes here: {latency * 1e6:.0f} µs and "
        f"{bandwidth / 1e6:,.0f} MB/s."
    )
    print(table, fit, sep="\n\n")
    if chosen.docs:
        page = chosen.docs / "distributed.md"
        about = (
            f"Medians of {extent.repetitions} in µs; {os.cpu_count()} cores, one thread a process, "
            f"{ROWS} rows each."
        )
        picture = "![Bytes and time of a layer step over the number of processes](distributed.png)"
        block = "\n\n".join([about, table, fit, picture])
        plot(rows, chosen.docs / "distributed.png")
        replace_in(page, page.read_text(), block, (BEGIN, END))
    return 0


if __name__ == "__main__":
    # By its module's name, as the processes it starts will see it.
    from benchmarks import distributed

    sys.exit(distributed.main(sys.argv[1:]))
