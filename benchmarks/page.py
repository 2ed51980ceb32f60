"""The measured part of docs/performance.md, between two comments; what is around it stays."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .files import written_beside
from .machine import one_line
from .result import Result
from .tables import all_tables

BEGIN = "<!-- BEGIN measured: written by python -m benchmarks --docs docs -->"
END = "<!-- END measured -->"
_ALT = {
    "speed-up": "Time of each peer over torch_bn's, over the shapes",
    "fused": "Time of batch norm and ReLU as two layers over that of the fused layer",
    "kernels": "Time of the kernels against the bytes of the input, with the copy as the floor",
    "threads": "Gain of more threads for the layer step and for the copy",
    "mlp": "Time of a training step of two MLPs",
}


def measured(result: Result, pictures: Sequence[Path]) -> str:
    """Markdown of the pictures and all tables."""
    parts = [f"Measured on {one_line(result.environment)}."]
    for picture in pictures:
        name = picture.stem.removeprefix("performance-")
        parts.append(f"![{_ALT.get(name, name)}]({picture.name})")
    parts += [table.markdown() for table in all_tables(result)]
    return "\n\n".join(parts)


def replace_between(text: str, new: str, comments: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what lies between the comments replaced; with both appended if it has neither.

    >>> replace_between(f"before {BEGIN} old {END} after", "new").split()[-2:]
    ['-->', 'after']

    Raises ValueError when only one of the two is there, or they are in the wrong order.
    """
    first, last = comments
    begin, end = text.find(first), text.find(last)
    block = f"{first}\n\n{new}\n\n{last}"
    if begin < 0 and end < 0:
        return f"{text.rstrip()}\n\n{block}\n".lstrip("\n")
    if begin < 0 or end < begin:
        raise ValueError(f"the page needs {first!r} and after it {last!r}")
    return text[:begin] + block + text[end + len(last) :]


def read(page: Path) -> str:
    """The page, or the beginning of one; ValueError if there is no place for what is measured."""
    text = page.read_text() if page.exists() else "# Performance\n"
    replace_between(text, "")
    return text


def write(result: Result, pictures: Sequence[Path], page: Path) -> None:
    """Makes the page if there is none."""
    replace_in(page, read(page), measured(result, pictures))


def replace_in(page: Path, text: str, new: str, comments: tuple[str, str] = (BEGIN, END)) -> None:
    """Writes a page whose text is `text`, with what lies between the comments replaced."""
    text = replace_between(text, new, comments)
    with written_beside(page) as beside:
        beside.write_text(text)
