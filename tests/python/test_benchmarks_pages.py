"""The benchmarks that write pages of the documentation, over little."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_benchmarks import status_of

import accuracy
import accuracy_peers
from benchmarks import distributed

DOCS = Path(__file__).parents[2] / "docs"


def few(_quick: bool) -> Iterator[tuple[torch.dtype, tuple[int, ...], float, float]]:
    for dtype in (torch.float32, torch.float64):
        yield dtype, (64, 3), 100.0, 1.0


def test_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing\nhere")

    monkeypatch.setattr(accuracy, "cases", few)
    # Compiling takes its time, and is as any other peer.
    monkeypatch.setitem(accuracy_peers._FORWARDS, "torch.compile", absent)
    docs = tmp_path / "docs"
    docs.mkdir()
    out = tmp_path / "out"
    small = accuracy_peers.compare
    monkeypatch.setattr(accuracy, "compare", lambda _: small(True))
    assert accuracy.main(["--out", str(out), "--docs", str(docs)]) == 0
    with (out / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Six quantities in training, four in evaluation.
    assert len(rows) == 2 * (6 + 4)
    assert all(float(row["ours"]) <= float(row["bound"]) for row in rows)
    page = (docs / "accuracy.md").read_text()
    said = f"All {len(rows)} figures are within their bounds."
    for text in (said, "| torch.compile | absent: no such thing | absent", "| oneDNN"):
        assert text in page
    assert said in capsys.readouterr().out
    for picture in (out / "accuracy.png", docs / "accuracy.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_figures_beyond_their_bounds_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "cases", few)
    monkeypatch.setattr(accuracy, "bound", lambda *_: 1e-30)
    monkeypatch.setattr(accuracy, "compare", lambda _: [])
    assert accuracy.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "figures are beyond their bounds" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--docs", "."], "--docs: the page is of the whole table"),
        (["--threads", "0"], "--threads must be positive"),
        (["--threads", "-1"], "--threads must be positive"),
        (["--out", "taken"], "error: "),
        (["--docs", "taken"], "error: "),
    ],
)
def test_accuracy_refuses_before_it_measures(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("a file")
    monkeypatch.setattr(accuracy, "cases", None)  # nothing comes as far as that
    assert status_of(accuracy.main, arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("page", [None, "without its comments"])
def test_distributed_refuses_before_it_measures(
    page: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if page is not None:
        (tmp_path / "distributed.md").write_text(page)
    monkeypatch.setattr(distributed, "in_own_network", None)  # nothing comes as far as that
    assert status_of(distributed.main, ["--docs", str(tmp_path)]) == 2


@pytest.mark.parametrize("own_network", [True, False])
def test_distributed(
    own_network: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In a network of its own where that may be had, and in this machine's."""
    if not own_network:
        monkeypatch.setenv("BN_OWN_NETWORK", "1")
    shutil.copy(DOCS / "distributed.md", tmp_path)
    before = (tmp_path / "distributed.md").read_text()
    assert distributed.main(["--quick", "--docs", str(tmp_path)]) == 0
    after = (tmp_path / "distributed.md").read_text()
    begin, end = (before.index(mark) for mark in (distributed.BEGIN, distributed.END))
    assert after.startswith(before[:begin])
    assert after.endswith(before[end:])
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in after[begin:].splitlines()
        if line.startswith(("| 1 |", "| 2 |"))
    ]
    extent = distributed.QUICK
    assert [(int(row[0]), int(row[1])) for row in table] == [
        (world, channels) for world in extent.worlds for channels in extent.channels
    ]
    for row in table:
        sent, values = (int(cell.replace(",", "")) for cell in row[-2:])
        assert values == 2 * int(row[0]) * (int(row[0]) - 1) * 8 * (2 + 2 * int(row[1]))
        assert sent >= values
    assert "A step of the ring between two processes here" in capfd.readouterr().out
    assert (tmp_path / "distributed.png").read_bytes().startswith(b"\x89PNG")
