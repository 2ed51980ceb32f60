"""Results on disk: one file for each run, so that an interrupted study goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlp.files import written_beside
from study.experiment import Settings

MAX_BYTES = 1 << 26
"""Largest file that is read as a result; those of the study have less than 1 MB."""


def _digest(value: Any) -> str:
    # As it is read back: numbers that are keys become text, and are sorted as such.
    whole = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()


class Store:
    """The results of runs in a folder, by everything that they depend on.

    `identity` is what all runs share: the data and the versions. A run with other settings, or of
    another identity, has another file; one that is damaged is as good as missing.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self._folder = folder
        self._identity = dict(identity)

    def path(self, experiment: str, settings: Settings) -> Path:
        digest = _digest([experiment, dict(settings), self._identity])
        return self._folder / experiment / f"{digest}.json"

    def load(self, experiment: str, settings: Settings) -> dict[str, Any] | None:
        """The result of that run; None if it has not been made."""
        path = self.path(experiment, settings)
        try:
            if path.stat().st_size > MAX_BYTES:
                return None
            found = json.loads(path.read_text(encoding="utf-8"))
            same = (found["settings"], found["identity"]) == (dict(settings), self._identity)
            result = found["result"]
            same = same and found["digest"] == _digest(result)
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return result if same else None

    def save(self, experiment: str, settings: Settings, result: Mapping[str, Any]) -> None:
        path = self.path(experiment, settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "settings": dict(settings),
            "identity": self._identity,
            "digest": _digest(result),
            "result": dict(result),
        }
        with written_beside(path) as beside:
            beside.write_text(json.dumps(whole, indent=1), encoding="utf-8")
