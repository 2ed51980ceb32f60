"""Saving a run so that it can go on to the same bits, and stopping it cleanly."""

from __future__ import annotations

import os
import signal
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mlp.files import written_beside
from mlp.training import Stage, State
from mlp.world import World

FORMAT = 1
MAX_BYTES = 1 << 30
"""Largest file that is read as a checkpoint; MNIST's is about 40 MB."""
EVERY_STEPS = 500
EVERY_SECONDS = 30.0


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; its one line says why and what to do."""


class _DamagedError(CheckpointError):
    """One that cannot be read, where another may do."""


def save_atomically(value: object, path: Path, keep: Path | None = None) -> None:
    """torch.save to a file beside `path`, then rename: a reader sees the old or the new one.

    The old one is kept under the name `keep`, if there is one.
    """
    with written_beside(path) as beside:
        with beside.open("wb") as file:
            torch.save(value, file)
            file.flush()
            # Without it a power cut may leave the new name on an empty file.
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)


class Checkpoint:
    """The state of all stages in one file, together with the settings they belong to.

    `identity` names everything that the figures depend on; a checkpoint of another one is refused.
    The one before is kept beside it, for when the last one is damaged. In a job of several
    processes, rank 0 writes and reads for all.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, str | int | float],
        world: World | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        self._path = path
        self._before = path.with_name(path.name + ".before")
        self._world = world or World()
        self._notify = notify
        self._identity = dict(identity)
        self._earlier = 0.0
        self._started = time.monotonic()
        self._saved_at = self._started
        self._unsaved_steps = 0

    @property
    def seconds(self) -> float:
        """Time the run has taken, all its parts together."""
        return self._earlier + time.monotonic() - self._started

    def load(self, stages: Sequence[Stage]) -> bool:
        """Put the stages where the checkpoint left them. False when there is none.

        Where the file is damaged, the one before is used. Raises CheckpointError when both are, or
        for that of a run with other settings.
        """
        saved = self._world.from_main(lambda: self._read_either(stages))
        if saved is None:
            return False
        self._put(saved, stages)
        return True

    def save(self, stages: Sequence[Stage]) -> None:
        if not self._world.main:
            return
        states: dict[str, State] = {stage.name: stage.state_dict() for stage in stages}
        save_atomically(
            {
                "format": FORMAT,
                "identity": self._identity,
                "stages": states,
                "seconds": self.seconds,
            },
            self._path,
            keep=self._before,
        )
        self._unsaved_steps, self._saved_at = 0, time.monotonic()

    def stepped(self, stages: Sequence[Stage]) -> None:
        """Call after each step: saves every so many steps, or seconds when steps are slow."""
        self._unsaved_steps += 1
        late = time.monotonic() - self._saved_at > EVERY_SECONDS
        if self._unsaved_steps >= EVERY_STEPS or late:
            self.save(stages)

    def remove(self) -> bool:
        """Whether there was one."""
        found = self._path.exists() or self._before.exists()
        if self._world.main:
            self._path.unlink(missing_ok=True)
            self._before.unlink(missing_ok=True)
        return found

    def _read_either(self, stages: Sequence[Stage]) -> State | None:
        """The last checkpoint, or if it is damaged the one before; None when there is neither."""
        error: _DamagedError | None = None
        for path in (self._path, self._before):
            if not path.exists():
                continue
            try:
                saved = self._read(path)
                self._put(saved, stages)
            except _DamagedError as damaged:
                error = error or damaged
                continue
            if path == self._before:
                self._notify(f"{self._path} is damaged or missing: using the one before.")
                # The next one saved is not to push it out and keep the damaged one.
                path.replace(self._path)
            return saved
        if error is not None:
            raise error
        return None

    def _read(self, path: Path) -> State:
        damaged = _DamagedError(
            f"{path} is damaged: start again without --resume, which overwrites it"
        )
        try:
            if path.stat().st_size > MAX_BYTES:
                raise damaged
            # torch.load does not look at the checksums that torch.save has written.
            with zipfile.ZipFile(path) as archive:
                # torch.save compresses nothing; what is compressed may unpack to any size.
                if sum(each.file_size for each in archive.infolist()) > MAX_BYTES:
                    raise damaged
                if archive.testzip() is not None:
                    raise damaged
            saved = torch.load(path, weights_only=True)
        except (CheckpointError, OSError):
            raise
        except Exception as error:
            # torch.load raises whatever its parts raise: zip, pickle, storage.
            raise damaged from error
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise damaged
        return saved

    def _put(self, saved: State, stages: Sequence[Stage]) -> None:
        damaged = _DamagedError(
            f"{self._path} is damaged: start again without --resume, which overwrites it"
        )
        try:
            self._refuse_others(saved["identity"])
            for stage in stages:
                stage.load_state_dict(saved["stages"][stage.name])
                if not 0 <= stage.position <= stage.total:
                    raise damaged
            self._earlier = float(saved["seconds"])
        except CheckpointError:
            raise
        except Exception as error:
            raise damaged from error

    def _refuse_others(self, identity: Mapping[str, Any]) -> None:
        for name in sorted(self._identity.keys() | identity.keys()):
            ours, theirs = self._identity.get(name), identity.get(name)
            if ours != theirs:
                raise CheckpointError(
                    f"cannot resume {self._path}: its {name} is {theirs}, this run's is {ours}; "
                    "resume with the same settings, or start again without --resume"
                )


class Interruption:
    """Turns SIGINT and SIGTERM into a request that is honoured between two steps.

    Until `defer` is called, and at a second signal, they interrupt at once (KeyboardInterrupt).
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        self._deferring = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested or not self._deferring:
            raise KeyboardInterrupt
        self.requested = True
