"""Tables, plot and documentation page of the accuracy measurement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table

import torch_bn
from accuracy_peers import HEADING, THREADS
from errors import QUANTITIES
from files import written_beside

if TYPE_CHECKING:
    from accuracy import Row

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_OURS, _BUILTIN = "#0072B2", "#D55E00"
_LINES = ("-", "--", ":", "-.")


def _worst(rows: Iterable[Row], by: str) -> dict[object, dict[str, tuple[float, float]]]:
    """Largest errors (ours, builtin) of each quantity, for each value of a column."""
    worst: dict[object, dict[str, tuple[float, float]]] = defaultdict(dict)
    for row in rows:
        group = worst[getattr(row, by)]
        ours, builtin = group.get(row.quantity, (0.0, 0.0))
        group[row.quantity] = (max(ours, row.ours), max(builtin, row.builtin))
    return worst


def _float32(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.dtype == "float32"]


def _float64(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.dtype == "float64"]


def _relative_to_bound(rows: Sequence[Row]) -> tuple[float, float]:
    return (
        max(row.ours / row.bound for row in rows),
        max(row.builtin / row.bound for row in rows),
    )


def _grid(rows: Sequence[Row], by: str) -> list[list[str]]:
    """One line per value of `by`: ours and builtin for each quantity."""
    lines = []
    for value, quantities in _worst(rows, by).items():
        label = f"{value:g}" if isinstance(value, float) else str(value)
        cells = [f"{ours:.1e} / {theirs:.1e}" for ours, theirs in map(quantities.get, QUANTITIES)]
        lines.append([label, *cells])
    return lines


def verdict(rows: Sequence[Row]) -> str:
    """One sentence on whether every bound holds."""
    failing = [row for row in rows if not row.holds]
    if not failing:
        return f"All {len(rows)} figures are within their bounds."
    return f"{len(failing)} of {len(rows)} figures are beyond their bounds: {failing[0]}"


def print_tables(
    rows: Sequence[Row], special: Sequence[tuple[str, str, str]], others: Sequence[Sequence[str]]
) -> None:
    """The summary, on the terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 160
    for by in ("shape", "mean"):
        table = Table(title=f"float32: largest error, ours / builtin, by {by}")
        for heading in (by, *QUANTITIES):
            table.add_column(heading, justify="right", no_wrap=True)
        for line in _grid(_float32(rows), by):
            table.add_row(*line)
        console.print(table)
    for title, headings, lines in (
        ("data at the ends of float32", ("data", "ours", "builtin"), special),
        ("float32: error of y in training", HEADING, others),
    ):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    ours, builtin = _relative_to_bound(_float64(rows))
    console.print(
        f"float64, against long double: ours at most {ours:.2f} of 1e-14 (1 + |mean|/std), "
        f"builtin at most {builtin:.2f}"
    )
    console.print(verdict(rows))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Error of y in training against the mean of the data and against the number of rows."""
    chosen = [r for r in _float32(rows) if r.quantity == "y" and r.mode == "training"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    counts = [n for n in (64, 4097, 65536, 1048576) if any(r.rows == n for r in chosen)]
    for n, style in zip(counts, _LINES, strict=False):
        of_n = [r for r in chosen if r.rows == n and r.std == 1]
        _curve(left, of_n, "mean", style, f"{n:,} rows")
    left.set_xscale("symlog", linthresh=1)
    left.set_xlabel("mean of the data (standard deviation 1)")
    left.set_ylabel("largest error of the output, relative")
    for mean, style in zip((0.0, 100.0, 1e4), _LINES, strict=False):
        of_mean = [r for r in chosen if r.mean == mean and r.std == 1 and r.shape.count("x") == 1]
        _curve(right, of_mean, "rows", style, f"mean {mean:g}")
    right.set_xscale("log")
    right.set_xlabel("rows")
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(1.5e-8, 3e3)  # room for the words below the line, and for the legend
        axes.axhline(2.0**-24, color="0.6", lw=1, zorder=0)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, ncols=2, loc="upper center")
    left.annotate(
        "half a unit in the last place of float32",
        (0.98, 2.0**-24),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="top",
        fontsize=8,
        color="0.4",
    )
    figure.suptitle("Training output in float32 against float64 arithmetic on the same data")
    figure.tight_layout()
    with written_beside(path) as beside:
        figure.savefig(beside, format="png", dpi=150)
    plt.close(figure)


def _curve(axes: plt.Axes, rows: Sequence[Row], by: str, style: str, label: str) -> None:
    worst = sorted((x, q["y"]) for x, q in _worst(rows, by).items())
    for which, color, name in ((0, _OURS, "torch_bn"), (1, _BUILTIN, "builtin")):
        axes.plot(
            [x for x, _ in worst],
            [error[which] for _, error in worst],
            style,
            color=color,
            marker="o",
            ms=3,
            label=f"{name}, {label}",
        )


def _table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = ["| " + " | ".join(heading) + " |", "| " + " | ".join("---" for _ in heading) + " |"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines)])


def markdown(
    rows: Sequence[Row], special: Sequence[tuple[str, str, str]], others: Sequence[Sequence[str]]
) -> str:
    """The documentation page."""
    info = torch_bn.build_info()
    single = _float32(rows)
    ours, builtin = _relative_to_bound(_float64(rows))
    return f"""# Accuracy

Made by `python benchmarks/accuracy.py --docs docs` with torch {torch.__version__} and the
{info["isa"]} kernels. Every cell is *ours / builtin*.

The error of an array is max |a - a64| / s. Here a64 comes from float64 arithmetic on the same
float32 data, and s is max |a64|; for `grad_input` s is max |weight * invstd * grad_output|, and for
`grad_weight` and `grad_bias` the largest channel's root of the sum of squared terms, because these
sums may cancel. The data are normal; each cell is the largest error over the other settings
(channels from 1 to 300, means 0 to 1e6, standard deviations 1e-2 to 1e3, training and evaluation),
where float32 can hold the data.

The promise in float32: at most 2.5e-7 for `y` and `grad_input`, 5e-7 for the rest, and nowhere
worse than the builtin by more than one rounding (6e-8). **{verdict(rows)}**

![Error of the output against the mean of the data and the number of rows](accuracy.png)

## float32, by shape

{_table(["shape", *QUANTITIES], _grid(single, "shape"))}

## float32, by mean of the data

{_table(["mean", *QUANTITIES], _grid(single, "mean"))}

## Data at the ends of float32

{_table(["data", "torch_bn", "builtin"], special)}

## Other implementations

The largest error of `y` in training on {THREADS[0]} to {THREADS[-1]} threads, and whether the
number of threads changes bits:

{_table(HEADING, others)}

## float64

Against long double arithmetic (64 bits of mantissa), the promise is 1e-14 (1 + |mean| / std)
with the channel's own mean and standard deviation. The largest error is {ours:.2f} of that; the
builtin's is {builtin:.2f}.

## bfloat16 and float16

A 16-bit result is the float32 result of the same values, rounded once; statistics are never held in
16 bits. The tests compare with `==` (tests/python/test_accuracy.py).
"""
