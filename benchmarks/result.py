"""What a run of the benchmarks finds, and how it is written to JSON and read back."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .files import written_beside

FORMAT = 1
MAX_BYTES = 1 << 26
"""Largest file that is read as a result; a whole run's has 0.4 MB."""

Better = Literal["higher", "lower", None]


@dataclass(frozen=True)
class Sample:
    """Median and quartiles of repeated measurements, in seconds or bytes.

    >>> Sample.of([3.0, 1.0, 2.0])
    Sample(median=2.0, q1=1.5, q3=2.5, count=3)
    """

    median: float
    q1: float
    q3: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        """Raises ValueError when there is nothing to summarise."""
        if not values:
            raise ValueError("no measurements")
        return Sample(statistics.median(values), *quartiles(values), len(values))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile, by linear interpolation between the ordered values.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 4.0)
    """
    if len(values) == 1:
        return values[0], values[0]
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, q3


@dataclass(frozen=True)
class Ratio:
    """A quotient of two medians, and the quartiles of the quotient taken repetition by repetition.

    `better` says which direction is an improvement of ours; None marks a figure that is only for
    information, which the guard passes over.

    >>> Ratio.of([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    Ratio(value=4.0, q1=2.5, q3=3.5, better='higher')
    """

    value: float
    q1: float
    q3: float
    better: Better = "higher"

    @staticmethod
    def of(above: Sequence[float], below: Sequence[float], better: Better = "higher") -> Ratio:
        """The two sequences are of the same repetitions; raises ValueError if they cannot be."""
        if len(above) != len(below):
            raise ValueError(f"{len(above)} repetitions above, {len(below)} below")
        value = statistics.median(above) / statistics.median(below)
        paired = [a / b for a, b in zip(above, below, strict=True)]
        return Ratio(value, *quartiles(paired), better)


@dataclass(frozen=True)
class Record:
    """One case: the measurements of several things taken in turn, and their quotients."""

    part: str  # "grid", "kernels", ...
    what: str  # "step", "forward", "evaluation", ...
    case: str  # a shape such as "64x100", or a network and its batch
    dtype: str
    threads: int
    samples: dict[str, Sample]
    ratios: dict[str, Ratio]
    unit: str = "s"
    size: int = 0  # bytes of the input, where a plot needs them

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What the case is called in a comparison of two runs."""
        return self.part, self.what, self.case, self.dtype, self.threads


@dataclass(frozen=True, order=True)
class Absent:
    """Something that was asked for and could not be measured, and why, in words."""

    part: str
    peer: str
    reason: str


@dataclass
class Result:
    """A whole run."""

    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    absent: list[Absent] = field(default_factory=list)

    def of(self, part: str, what: str | None = None, threads: int | None = None) -> list[Record]:
        """The records of a part, in the order in which they were measured."""
        return [
            r
            for r in self.records
            if r.part == part and what in (None, r.what) and threads in (None, r.threads)
        ]

    def miss(self, part: str, peer: str, reason: str) -> None:
        """Notes an absence once."""
        absence = Absent(part, peer, reason)
        if absence not in self.absent:
            self.absent.append(absence)

    def write(self, path: Path) -> None:
        """As JSON, which takes the place of an older file whole."""
        with written_beside(path) as beside:
            beside.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @staticmethod
    def read(path: Path) -> Result:
        """Raises ValueError in words when the file is not of this tool's format."""
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path} is larger than {MAX_BYTES} bytes")
        try:
            data = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is not a result of these benchmarks (format {FORMAT})")
        try:
            records = [
                Record(
                    **{
                        **record,
                        "threads": int(record["threads"]),
                        "samples": {k: Sample(**_numbers(v)) for k, v in record["samples"].items()},
                        "ratios": {k: Ratio(**_numbers(v)) for k, v in record["ratios"].items()},
                    }
                )
                for record in data["records"]
            ]
            absent = [Absent(**a) for a in data["absent"]]
            return Result(dict(data["environment"]), dict(data["settings"]), records, absent)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} has a damaged record ({what})") from None


def _numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a sample or ratio; raises TypeError where a figure is no number."""
    for name, value in fields.items():
        if name != "better" and not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r}")
    return fields


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios; raises ValueError when there are none or one is not positive.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    logs = [math.log2(value) for value in values]
    if not logs:
        raise ValueError("the geometric mean of nothing")
    return math.exp2(math.fsum(logs) / len(logs))
