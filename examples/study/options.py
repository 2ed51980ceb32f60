"""The command line of the study."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlp.options import add_data_arguments, whole


@dataclass(frozen=True)
class Options:
    """The whole command line; `only` names the experiments to make."""

    only: tuple[str, ...]
    quick: bool
    jobs: int
    out: Path
    restart: bool
    data: Path | None
    data_url: str
    cache: Path | None


def parse(argv: Sequence[str] | None, names: dict[int, str]) -> Options:
    """The options in `argv` (the process's own when None). Exits with 2 when they are wrong.

    `names` are those of the experiments, by number.
    """
    parser = argparse.ArgumentParser(
        prog="study",
        description="Measure what batch norm does, and write a report. A study that was "
        "interrupted goes on where it was: runs whose results are in --out are not made again.",
        epilog="Exit status: 0 the report is written, whether or not the claims held; 2 wrong "
        "usage or data; 130 interrupted.",
    )
    listed = ", ".join(f"{number} {name}" for number, name in names.items())
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="EXPERIMENT",
        default=[*names.values()],
        help=f"numbers or names of experiments, of: {listed}",
    )
    parser.add_argument(
        "--quick", action="store_true", help="all of it in minutes: too short for findings"
    )
    parser.add_argument(
        "--jobs",
        type=whole(1, 1024),
        default=2,
        metavar="N",
        help="runs made at a time, each with one thread (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: runs/study[-quick])"
    )
    parser.add_argument(
        "--restart", action="store_true", help="make every run again, whatever is in --out"
    )
    add_data_arguments(parser.add_argument_group("data"))
    values = parser.parse_args(argv)
    by_number = {str(number): name for number, name in names.items()}
    only = [by_number.get(word, word) for word in values.only]
    for word in only:
        if word not in names.values():
            parser.error(f"argument --only: there is no experiment {word!r}, there are {listed}")
    return Options(
        only=tuple(only),
        quick=values.quick,
        jobs=values.jobs,
        out=values.out or Path("runs") / ("study-quick" if values.quick else "study"),
        restart=values.restart,
        data=values.data,
        data_url=values.data_url,
        cache=values.cache,
    )
