"""The guard against regressions: which ratios fell between two runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .result import Ratio, Result
from .tables import ratio_text

Key = tuple[str, str, str, str, int, str]
# A difference in one of these explains a fall better than a change of the code.
ENVIRONMENT = ("cpu", "processors", "torch", "isa")


@dataclass(frozen=True)
class Change:
    """One ratio in both runs."""

    name: str
    old: Ratio
    new: Ratio

    @property
    def factor(self) -> float:
        """How much better it became: below 1, it fell, whichever direction is the better one."""
        old, new = self.old.value, self.new.value
        if min(old, new) <= 0:
            # A share of a step may measure as nothing or less: there the difference decides.
            old, new = 1.0, 1.0 + (new - old)
            if new <= 0:
                return 0.0 if self.new.better == "higher" else float("inf")
        return new / old if self.new.better == "higher" else old / new

    @property
    def overlap(self) -> bool:
        """Whether the quartiles of the two runs overlap: then a fall may be noise."""
        return self.old.q1 <= self.new.q3 and self.new.q1 <= self.old.q3

    def fell(self, tolerance: float) -> bool:
        return self.factor < 1 - tolerance


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side."""

    changes: list[Change]
    only_old: list[str]
    only_new: list[str]
    differences: list[str]

    def fallen(self, tolerance: float) -> list[Change]:
        """The worst first."""
        return sorted((c for c in self.changes if c.fell(tolerance)), key=lambda c: c.factor)


def _ratios(result: Result) -> dict[Key, Ratio]:
    return {
        (*record.key, name): ratio
        for record in result.records
        for name, ratio in record.ratios.items()
        if ratio.better is not None
    }


def _name(key: Key) -> str:
    part, what, case, dtype, threads, ratio = key
    return f"{part}: {what}, {case}, {dtype}, threads {threads}: {ratio}"


def compare(old: Result, new: Result) -> Comparison:
    """Ratios that are for information only are left out."""
    before, after = _ratios(old), _ratios(new)
    return Comparison(
        [Change(_name(key), before[key], after[key]) for key in before if key in after],
        [_name(key) for key in before if key not in after],
        [_name(key) for key in after if key not in before],
        [
            f"{name}: {old.environment.get(name)} before, {new.environment.get(name)} now"
            for name in ENVIRONMENT
            if old.environment.get(name) != new.environment.get(name)
        ],
    )


def show(comparison: Comparison, tolerance: float, console: Console) -> None:
    """What fell, and what could not be compared."""
    fallen = comparison.fallen(tolerance)
    if fallen:
        table = Table(
            title=f"Fell by more than {tolerance:.0%}", box=box.SIMPLE_HEAD, title_justify="left"
        )
        table.add_column("ratio")
        for heading in ("old", "new", "change", "quartiles"):
            table.add_column(heading, justify="right", no_wrap=True)
        for c in fallen:
            quartiles = "overlap" if c.overlap else "apart"
            change = f"{c.factor - 1:+.0%}"
            table.add_row(c.name, ratio_text(c.old), ratio_text(c.new), change, quartiles)
        console.print(table)
    console.print(f"{len(fallen)} of {len(comparison.changes)} ratios fell beyond the tolerance.")
    for run, names in (("old", comparison.only_old), ("new", comparison.only_new)):
        if names:
            console.print(f"Ignored, only the {run} file has them ({len(names)}):")
            for name in names:
                console.print(f"  {name}", highlight=False)
    for difference in comparison.differences:
        console.print(f"The runs are of different environments: {difference}.")


def tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(arguments: Sequence[str], console: Console) -> int:
    """Exit code 1 when a ratio fell beyond the tolerance, 2 when the files cannot be compared."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description="Says which ratios of ours fell from OLD to NEW, and fails if any did.",
    )
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument(
        "--tolerance", type=tolerance, default=0.1, help="a fall this large is passed over (0.1)"
    )
    chosen = parser.parse_args(arguments)
    try:
        comparison = compare(Result.read(chosen.old), Result.read(chosen.new))
    except (OSError, ValueError) as error:
        console.print(f"{error}", style="red")
        return 2
    if not comparison.changes:
        console.print("The files have no ratio in common.", style="red")
        return 2
    show(comparison, chosen.tolerance, console)
    return 1 if comparison.fallen(chosen.tolerance) else 0
