"""The list of deliberate faults, tests/mutation/faults.toml, and whether it fits the source."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
LIST = ROOT / "tests" / "mutation" / "faults.toml"


class ListError(Exception):
    """The list does not fit the source."""


@dataclass(frozen=True)
class Edit:
    """Text of a file to be replaced, and how often it occurs."""

    file: str
    find: str
    replace: str
    times: int = 1

    def problem(self, root: Path) -> str | None:
        """What is wrong with the edit, in words; None if nothing is."""
        if self.find == self.replace:
            return "the replacement is the text itself"
        path = root / self.file
        if not path.is_file():
            return f"there is no file {self.file}"
        found = path.read_text().count(self.find)
        if found != self.times:
            text = repr(self.find.strip())
            return f"{self.file} has its text {found} times, not {self.times}: {text}"
        return None

    def apply(self, root: Path) -> None:
        """Replace the text in the file under `root`."""
        path = root / self.file
        path.write_text(path.read_text().replace(self.find, self.replace))


@dataclass(frozen=True)
class Command:
    """A program of tests/cpp with arguments, or a test file for pytest."""

    words: tuple[str, ...]

    @property
    def is_python(self) -> bool:
        """Whether pytest runs it."""
        return ".py" in self.words[0]

    def problem(self, root: Path) -> str | None:
        """What is wrong with the command, in words; None if nothing is."""
        name, _, test = self.words[0].partition("::")
        if not self.is_python:
            name = f"tests/cpp/{name}.cpp"
        path = root / name
        if not path.is_file():
            return f"there is no file {name}"
        if test and f"\ndef {test.partition('[')[0]}(" not in path.read_text():
            return f"{name} has no test {test}"
        return None


@dataclass(frozen=True)
class Fault:
    """One deliberate fault and the tests that are to catch it."""

    name: str
    kind: str
    why: str
    tests: tuple[Command, ...]
    edits: tuple[Edit, ...]

    @property
    def files(self) -> list[str]:
        """The files it changes."""
        return list(dict.fromkeys(edit.file for edit in self.edits))

    @property
    def programs(self) -> list[str]:
        """The C++ programs that its tests run."""
        return [test.words[0] for test in self.tests if not test.is_python]

    @property
    def needs_python(self) -> bool:
        """Whether the Python package must be built."""
        return any(test.is_python for test in self.tests)

    def problems(self, root: Path = ROOT) -> list[str]:
        """What is wrong with the fault, in words."""
        checked: list[Edit | Command] = [*self.edits, *self.tests]
        found = [each.problem(root) for each in checked]
        if not self.edits or not self.tests:
            found.append("it needs an edit and a test")
        return [f"{self.name}: {problem}" for problem in found if problem]


def _fault(entry: dict[str, Any]) -> Fault:
    return Fault(
        entry["name"],
        entry["kind"],
        entry["why"],
        tuple(Command(tuple(shlex.split(test))) for test in entry["tests"]),
        tuple(Edit(**edit) for edit in entry["edit"]),
    )


def read_faults(path: Path = LIST) -> list[Fault]:
    """The faults of a list, in its order.

    Raises:
        ListError: An entry lacks a key or has an unknown one, or two have one name.
    """
    try:
        faults = [_fault(entry) for entry in tomllib.loads(path.read_text())["fault"]]
    except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ListError(f"{path.name}: {type(error).__name__}: {error}") from error
    names = [fault.name for fault in faults]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ListError(f"{path.name}: two faults have the name {', '.join(twice)}")
    return faults
