"""The plots of a run, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .files import written_beside
from .fused import COMPILE
from .machine import one_line
from .peers import DIRECTIONS
from .result import Record, Result, Sample

# Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = {
    "ours": "#0072B2",
    "builtin": "#E69F00",
    "compile": "#009E73",
    "onednn": "#CC79A7",
    "jax": "#56B4E9",
    "without": "#009E73",
    "unfused": "#56B4E9",
    "copy": "#555555",
}
LABELS = {
    "ours": "torch_bn",
    "compile": "torch.compile",
    "onednn": "oneDNN",
    "jax": "JAX",
    "without": "without batch norm",
}
FUSED_LABELS = {
    "builtin": "builtin pair",
    "unfused": "torch_bn and a ReLU",
    "compile": "torch.compile of the builtin pair",
}
MARKS = {"compile": "s", "unfused": "^"}  # the others' is a disc
STYLE = {
    "figure.dpi": 130,
    "font.size": 9.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}
_FEW_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TICKS = (0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)


def label(name: str) -> str:
    return LABELS.get(name, name)


def _ratio_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_ylim()
    low, high = min(low, 0.65), max(high, 1.6)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator(_TICKS if high / low < 15 else _FEW_TICKS))
    axes.axhline(1, color="#888888", linewidth=1, zorder=1)


def speed_up(result: Result) -> Figure | None:
    """How many times faster than each peer, shape by shape, with the most threads."""
    directions = [w for w in ("step", "forward", "evaluation") if result.of("grid", w)]
    if not directions:
        return None
    figure, all_axes = plt.subplots(
        len(directions), 1, figsize=(9.5, 2.7 * len(directions)), sharex=True, squeeze=False
    )
    for axes, what in zip(all_axes[:, 0], directions, strict=True):
        records = _most_threads(result.of("grid", what))
        cases = [r.case for r in records]
        records = records + _most_threads(result.of("peers", what))
        _ratios(axes, records, cases)
        axes.set_ylabel(f"{what}\ntime / torch_bn's time")
    handles, labels = _legend_of(all_axes[:, 0])
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle("Above 1, torch_bn is faster; bars are quartiles", x=0.01, ha="left")
    return figure


def _ratios(
    axes: Axes, records: Sequence[Record], cases: Sequence[str], labels: Mapping[str, str] = LABELS
) -> None:
    """Every ratio of the records, case by case, with its quartiles."""
    names = list(dict.fromkeys(n for r in records for n in r.ratios))
    for i, name in enumerate(names):
        peer = name.partition("/")[0]
        found = [
            (cases.index(r.case), r.ratios[name])
            for r in records
            if name in r.ratios and r.case in cases
        ]
        shift = 0.14 * (i - (len(names) - 1) / 2)
        axes.errorbar(
            [k + shift for k, _ in found],
            [ratio.value for _, ratio in found],
            # The quartiles of the pairs need not lie on both sides of the quotient of medians.
            yerr=[
                [max(0.0, ratio.value - ratio.q1) for _, ratio in found],
                [max(0.0, ratio.q3 - ratio.value) for _, ratio in found],
            ],
            fmt=MARKS.get(peer, "o"),
            markersize=5,
            elinewidth=1.4,
            color=COLOURS.get(peer),
            label=labels.get(peer, peer),
        )
    _ratio_axis(axes)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")


def fused(result: Result) -> Figure | None:
    """How many times faster than the pair of layers, in both orders, with the most threads."""
    found = dict.fromkeys(r.what for r in result.of("fused"))
    orders = list(dict.fromkeys(what.split(", ")[1] for what in found))
    directions = [w for w in DIRECTIONS if any(what.startswith(w) for what in found)]
    if not directions:
        return None
    figure, all_axes = plt.subplots(
        len(directions),
        len(orders),
        figsize=(6 * len(orders), 2.7 * len(directions)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for row, what in zip(all_axes, directions, strict=True):
        for axes, order in zip(row, orders, strict=True):
            records = _most_threads(result.of("fused", f"{what}, {order}"))
            cases = [r.case for r in records]
            beside = _most_threads(result.of("fused", f"{what}, {order}, {COMPILE}"))
            _ratios(axes, records + beside, cases, FUSED_LABELS)
            if axes in all_axes[0]:
                axes.set_title(order)
        row[0].set_ylabel(f"{what}\ntime / fused layer's time")
    handles, labels = _legend_of(all_axes.flat)
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    threads = _most_threads(result.of("fused"))[0].threads
    figure.suptitle(
        f"Above 1, the fused layer is faster; {threads} threads, bars are quartiles",
        x=0.01,
        ha="left",
    )
    return figure


def _legend_of(all_axes: Iterable[Axes]) -> tuple[list, list]:
    found = {}
    for axes in all_axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)


def _most_threads(records: Sequence[Record]) -> list[Record]:
    most = max((r.threads for r in records), default=0)
    return [r for r in records if r.threads == most]


def kernels(result: Result) -> Figure | None:
    """Time of the operators against bytes of the input, over the copy."""
    if not result.of("kernels"):
        return None
    records = sorted(_most_threads(result.of("kernels")), key=lambda r: r.size)
    operators = ("forward", "backward", "evaluation")
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
    for axes, operator in zip(all_axes, operators, strict=True):
        for name, key, mark in (("builtin", f"builtin {operator}", "s"), ("ours", operator, "o")):
            axes.plot(
                [r.size for r in records],
                [r.samples[key].median for r in records],
                mark,
                markersize=5,
                color=COLOURS[name],
                label=label(name),
            )
        floor = _floor(records)
        if floor:
            axes.plot(list(floor), list(floor.values()), color=COLOURS["copy"], label="best copy")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(operator)
        axes.set_xlabel("input")
        axes.xaxis.set_major_locator(FixedLocator([2**k for k in (14, 17, 20, 23, 26, 29)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    all_axes[0].set_ylabel("seconds a call")
    all_axes[0].legend(frameon=False, loc="upper left")
    threads = records[0].threads
    figure.suptitle(f"Kernels, results in memory used before, {threads} threads", x=0.01, ha="left")
    return figure


def _floor(records: Sequence[Record]) -> dict[int, float]:
    """Bytes to the time of the fastest copy of as many."""
    floor: dict[int, float] = {}
    for r in records:
        for name in ("memcpy", "streaming"):
            if name in r.samples:
                floor[r.size] = min(floor.get(r.size, math.inf), r.samples[name].median)
    return floor


def _bytes(value: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"


def scaling(result: Result) -> Figure | None:
    """How much faster more threads are, for ours and for the copy."""
    records = result.of("threads", "gain, step")
    if not records:
        return None
    figure, axes = plt.subplots(figsize=(9.5, 4))
    series = {
        name: [n for n in records[0].samples if n.startswith(f"{name} ")]
        for name in ("ours", "copy")
    }
    counts = [int(n.split()[1]) for n in series["ours"]][1:]
    width = 0.8 / max(1, len(counts) * 2)
    for i, name in enumerate(n for n in series if series[n]):
        for j, count in enumerate(counts):
            gains = [
                r.samples[f"{name} 1"].median / r.samples[f"{name} {count}"].median for r in records
            ]
            at = i * len(counts) + j
            axes.bar(
                [k + (at + 0.5) * width - 0.4 for k in range(len(records))],
                gains,
                width * 0.92,
                color=COLOURS[name],
                alpha=0.45 + 0.55 * (j + 1) / len(counts),
                label=f"{'layer step' if name == 'ours' else 'copy'}, {count} threads",
            )
    axes.axhline(1, color="#888888", linewidth=1)
    axes.set_xticks(range(len(records)), [r.case for r in records])
    axes.set_ylabel("one thread's time / time")
    axes.set_title("Gain of more threads", loc="left")
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def mlps(result: Result) -> Figure | None:
    """Time of a step of the networks, with the most threads."""
    if not result.of("mlp"):
        return None
    records = _most_threads(result.of("mlp"))
    sizes = list(dict.fromkeys(r.case.split(",")[0] for r in records))
    figure, all_axes = plt.subplots(1, len(sizes), figsize=(9.5, 4), squeeze=False)
    for axes, size in zip(all_axes[0], sizes, strict=True):
        of_size = [r for r in records if r.case.startswith(f"{size},")]
        for i, name in enumerate(("without", "ours", "builtin")):
            samples = [r.samples[name] for r in of_size]
            axes.errorbar(
                [k + (i - 1) * 0.15 for k in range(len(of_size))],
                [s.median * 1e3 for s in samples],
                yerr=_quartile_bars(samples),
                fmt="o",
                markersize=5,
                elinewidth=1.4,
                color=COLOURS[name],
                label=label(name),
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xticks(range(len(of_size)), [r.case.split()[-1] for r in of_size])
        axes.set_xlabel("batch")
        axes.set_title(size)
    all_axes[0][0].set_ylabel("milliseconds a step")
    all_axes[0][0].legend(frameon=False, loc="upper left")
    threads = records[0].threads
    figure.suptitle(
        f"Training step without optimiser, {threads} threads; bars are quartiles", x=0.01, ha="left"
    )
    return figure


def _quartile_bars(samples: Sequence[Sample]) -> list[list[float]]:
    return [
        [(s.median - s.q1) * 1e3 for s in samples],
        [(s.q3 - s.median) * 1e3 for s in samples],
    ]


FIGURES: dict[str, Callable[[Result], Figure | None]] = {
    "speed-up": speed_up,
    "fused": fused,
    "kernels": kernels,
    "threads": scaling,
    "mlp": mlps,
}


def draw(result: Result, folder: Path) -> list[Path]:
    """Writes performance-*.png for every part that was measured; returns their paths."""
    written = []
    with plt.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make(result)
            if figure is None:
                continue
            figure.text(0.995, -0.01, one_line(result.environment), ha="right", va="top", size=7)
            path = folder / f"performance-{name}.png"
            with written_beside(path) as beside:
                figure.savefig(beside, format="png", bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written
