"""Files of which a reader sees all or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A file to write to, which takes the place of `path` when the block has ended well."""
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def folder_for(path: Path) -> None:
    """Make the folder of a file that will be written; raises OSError where that cannot be."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
