"""Progress of the stages: bars on a terminal, a line per epoch elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)


class Shown(Protocol):
    """What a bar needs to know; a Stage knows it."""

    name: str
    title: str
    total: int
    position: int

    def status(self) -> str: ...


class StageProgress:
    """A bar for each stage, with what its `status` says, while the block runs."""

    def __init__(self, console: Console, stages: Sequence[Shown]) -> None:
        self._console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {
            stage.name: self._bars.add_task(
                stage.title, total=stage.total, completed=stage.position, status=stage.status()
            )
            for stage in stages
        }

    def __enter__(self) -> StageProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stepped(self, stage: Shown, line: str | None) -> None:
        self._bars.update(self._tasks[stage.name], completed=stage.position, status=stage.status())
        if line:
            # Soft wrap: a log keeps one line per epoch whatever width it is thought to have.
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
