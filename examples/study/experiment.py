"""What an experiment is: its runs, and what is claimed, tabled and drawn from their results."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from matplotlib.figure import Figure

from mlp.data import Dataset

Settings = Mapping[str, str | int | float | bool | None]
"""Of one run: with the data and the versions, everything that its result depends on."""


@dataclass(frozen=True)
class Run:
    """One run that is done: its result is what JSON can hold."""

    settings: Settings
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """Something expected, with the criterion that the code has judged it by."""

    statement: str
    expected: str
    seen: str
    held: bool


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Findings:
    """What the report shows of an experiment. Figures come with what they show, in words."""

    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[Figure, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Experiment:
    """`plan(quick)` gives the settings of the runs, `measure` makes one of them.

    `findings` is given the runs in the order of the plan.
    """

    number: int
    name: str
    title: str
    about: str
    plan: Callable[[bool], list[Settings]]
    measure: Callable[[Settings, Dataset], Mapping[str, Any]]
    findings: Callable[[Sequence[Run]], Findings]


def grid(**axes: Iterable[Any]) -> list[dict[str, Any]]:
    """Every combination of the values, the last name varying fastest."""
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


class Group(dict[tuple[Any, ...], list[Run]]):
    """Runs by the values of some settings, in the order of the runs."""

    def __init__(self, runs: Sequence[Run], *names: str) -> None:
        found = defaultdict(list)
        for run in runs:
            found[tuple(run.settings[name] for name in names)].append(run)
        super().__init__(found)

    def results(self, *key: Any, of: str) -> list[Any]:
        """That figure of each run of the group, mostly one for each seed."""
        return [run.result[of] for run in self[key]]

    def each(self, of: str) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
        for key in self:
            yield key, self.results(*key, of=of)


def of_kind(runs: Sequence[Run], kind: str) -> list[Run]:
    """Of an experiment that makes several kinds of runs, those of one."""
    return [run for run in runs if run.settings["kind"] == kind]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def spread(values: Sequence[float], form: str = ".2%") -> str:
    """The mean and the extremes, as text."""
    low, high = min(values), max(values)
    if len(values) == 1:
        return f"{low:{form}}"
    return f"{mean(values):{form}} ({low:{form}} to {high:{form}})"
