"""What a proof hands to the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A row of the table of proofs; `builtin` is empty where only a difference is measured."""

    what: str
    ours: str
    builtin: str
    bound: str
    passed: bool


@dataclass(frozen=True)
class Proof:
    """The outcome of one proof: how it was made, why this bound, and all its figures."""

    name: str
    how: str
    why: str
    lines: list[Line]
    figures: dict[str, Any] = field(repr=False)

    @property
    def passed(self) -> bool:
        return all(line.passed for line in self.lines)
