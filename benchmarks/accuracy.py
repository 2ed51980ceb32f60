"""Accuracy of torch_bn.BatchNorm1d and of the builtin layer against wider arithmetic.

Prints the table, and writes every figure as CSV, a plot, and with --docs the page of the
documentation that shows them.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

import torch_bn
from accuracy_peers import compare
from accuracy_report import draw, markdown, print_tables
from errors import QUANTITIES, Problem, errors, make_problem, mean_over_std, run
from files import folder_for, written_beside

MEANS = (0.0, 1.0, 100.0, 1e4, 1e6)
STDS = (1e-2, 1.0, 1e3)
CHANNELS = {
    2: (1, 7, 64, 300),
    3: (1, 7, 64, 300),
    64: (1, 7, 64, 300),
    4097: (1, 7, 64, 300),
    65536: (1, 64, 300),
    1048576: (1, 16),
}
SEQUENCES = ((32, 64, 512), (128, 256, 64))
# 315 million elements: once, with the mean at which the builtin has no digit left.
LARGEST = ((1048576, 300), 1e4, 1.0)


@dataclass(frozen=True)
class Row:
    """One figure of the table; errors are defined in `errors`."""

    dtype: str
    shape: str
    rows: int
    mean: float
    std: float
    mode: str
    quantity: str
    ours: float
    builtin: float
    bound: float

    @property
    def holds(self) -> bool:
        """Within the bound, and in float32 no worse than the builtin by more than a rounding."""
        rounding = 2.0**-24
        no_worse = self.dtype != "float32" or not self.ours > self.builtin + rounding
        return self.ours <= self.bound and no_worse


def bound(problem: Problem, quantity: str) -> float:
    """The error that is promised."""
    if problem.x.dtype == torch.float64:
        return 1e-14 * (1 + mean_over_std(problem))
    return 2.5e-7 if quantity in ("y", "grad_input") else 5e-7


def representable(mean: float, std: float, dtype: torch.dtype) -> bool:
    """Whether the type's spacing of numbers around `mean` lies below `std`."""
    return mean * torch.finfo(dtype).eps < std


def cases(quick: bool) -> Iterator[tuple[torch.dtype, tuple[int, ...], float, float]]:
    """Types, shapes, means and standard deviations of the table."""
    shapes: list[tuple[int, ...]] = [(n, c) for n, widths in CHANNELS.items() for c in widths]
    shapes += SEQUENCES
    for dtype in (torch.float32, torch.float64):
        for shape in shapes:
            large = np.prod(shape) > 200_000
            # The longer reference of float64 is slow: its error does not depend on the width.
            if large and (quick or (dtype == torch.float64 and shape[1] > 64)):
                continue
            for mean in MEANS:
                for std in STDS:
                    if representable(mean, std, dtype):
                        yield dtype, shape, mean, std
    if not quick:
        yield (torch.float32, *LARGEST)


def measure(dtype: torch.dtype, shape: tuple[int, ...], mean: float, std: float) -> Iterator[Row]:
    """The rows of one case, in training and in evaluation."""
    wide = np.longdouble if dtype == torch.float64 else np.float64
    for training in (True, False):
        problem = make_problem(shape, mean, std, training=training, dtype=dtype)
        ours, builtin = (
            errors(run(layer, problem), problem, wide)
            for layer in (torch_bn.BatchNorm1d, torch.nn.BatchNorm1d)
        )
        for quantity in QUANTITIES:
            if training or not quantity.startswith("running"):
                yield Row(
                    dtype=str(dtype).removeprefix("torch."),
                    shape="x".join(map(str, shape)),
                    rows=problem.x.numel() // shape[1],
                    mean=mean,
                    std=std,
                    mode="training" if training else "evaluation",
                    quantity=quantity,
                    ours=ours[quantity],
                    builtin=builtin[quantity],
                    bound=bound(problem, quantity),
                )


def special_cases() -> list[tuple[str, str, str]]:
    """What ours and the builtin make of data at the ends of float32: (data, ours, builtin)."""

    def shown(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> str:
        y = layer(x).detach()
        return f"{y.abs().max().item():.6g}"

    signs = torch.tensor([[1.0], [-1.0]]).repeat(50, 1)
    data = {
        "constant 1e8, (4, 2): max |y|, right is 0": torch.full((4, 2), 1e8),
        "constant 0.1, (1000, 2): max |y|, right is 0": torch.full((1000, 2), 0.1),
        "+-1e30, (100, 1): max |y|, right is 1": signs * 1e30,
        "+-3e38, (100, 1): max |y|, right is 1": signs * 3e38,
        "+-1e-30, (100, 1): max |y|, right is 3.16228e-28": signs * 1e-30,
        "+-1e-42 (subnormal), (100, 1): max |y|, right is 3.16e-40": signs * 1e-42,
    }
    return [
        (
            name,
            shown(torch_bn.BatchNorm1d(x.shape[1]), x),
            shown(torch.nn.BatchNorm1d(x.shape[1]), x),
        )
        for name, x in data.items()
    ]


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Every figure, one a line."""
    with written_beside(path) as beside, beside.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row.__dataclass_fields__)
        writer.writerows(asdict(row).values() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write; 1 if a bound does not hold, 2 if nothing could be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder to write")
    parser.add_argument("--docs", type=Path, help="also write accuracy.md and its plot here")
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--threads", type=int, help="threads of both (default: torch's own)")
    options = parser.parse_args(argv)
    if options.quick and options.docs:
        parser.error("--docs: the page is of the whole table, not of --quick")
    if options.threads is not None:
        if options.threads < 1:
            parser.error("--threads must be positive")
        torch.set_num_threads(options.threads)
    try:
        for folder in filter(None, (options.out, options.docs)):
            folder_for(folder / "accuracy.png")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    rows = [
        row
        for case in track(list(cases(options.quick)), description="measuring")
        for row in measure(*case)
    ]
    special = special_cases()
    others = compare(options.quick)
    print_tables(rows, special, others)
    write_csv(rows, options.out / "accuracy.csv")
    draw(rows, options.out / "accuracy.png")
    if options.docs:
        draw(rows, options.docs / "accuracy.png")
        with written_beside(options.docs / "accuracy.md") as beside:
            beside.write_text(markdown(rows, special, others))
    print(f"figures and plot: {options.out}/accuracy.csv, {options.out}/accuracy.png")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
