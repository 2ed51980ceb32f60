"""Interrupting the training job and resuming it: the same bits as without."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import train_mlp
from mlp_settings import settings
from rich.console import Console

import torch_bn
from mlp import checkpoint as checkpoints
from mlp.checkpoint import Checkpoint, CheckpointError, Interruption
from mlp.data import Dataset, Split
from mlp.job import Job
from mlp.model import generator

SCRIPT = Path(train_mlp.__file__)
# Nothing listens on port 9 of this machine: the job falls back on the digits at once.
OFFLINE = ["--data-url", "http://127.0.0.1:9/", "--threads", "1", "--epochs", "4"]


@pytest.fixture(autouse=True)
def _no_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_BN_MNIST", raising=False)


def job(**changes: object) -> Job:
    source = generator("images")
    splits = []
    for count in (40, 20, 20):
        images = torch.randint(256, (count, 3, 3), generator=source, dtype=torch.uint8)
        splits.append(Split(images, images.flatten(1).argmax(1)))
    return Job(settings(**changes), Dataset("random", "here", *splits), torch_bn.BatchNorm1d)


class StopAfter(Interruption):
    """As if a signal had come during the step of this number."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left == 0


def outcome(job: Job) -> dict[str, Any]:
    """Every weight, optimizer state and figure."""
    return {stage.name: stage.state_dict() for stage in job.stages}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run(job: Job, path: Path, stop: Interruption) -> bool:
    return job.run(Checkpoint(path, job.identity()), stop, Console(quiet=True))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumed_at_any_step_of_any_stage(optimizer: str, tmp_path: Path) -> None:
    changes = {"placement": "after", "optimizer": optimizer}
    whole = job(**changes)
    assert run(whole, tmp_path / "whole.pt", Interruption())
    totals = [stage.total for stage in whole.stages]
    float64, float32 = totals[0], totals[0] + totals[1]
    # Inside and at the end of an epoch, last step of a stage, inside each stage, between two
    # seeds, and the very last.
    moments = (2, 3, float64, float32 - 5, float32 + 6, float32 + 8, sum(totals))
    for steps in moments:
        path = tmp_path / f"{steps}.pt"
        first = job(**changes)
        assert not run(first, path, StopAfter(steps)), "it went on"
        assert sum(stage.position for stage in first.stages) == steps
        second = job(**changes)
        assert Checkpoint(path, second.identity()).load(second.stages)
        assert run(second, path, Interruption())
        assert same(outcome(second), outcome(whole)), f"interrupted after {steps} steps"


def test_periodic_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    trained = job(validate="off", epochs=4)
    stages = trained.stages
    monkeypatch.setattr(Checkpoint, "save", lambda self, s: saved.append(s[0].position))
    assert run(trained, tmp_path / "checkpoint.pt", Interruption())
    assert saved == [3, 6, 9, 12], "one at the end of each epoch of three steps"
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "EVERY_STEPS", 2)
    periodic = Checkpoint(tmp_path / "checkpoint.pt", {})
    periodic.stepped(stages)
    assert not (tmp_path / "checkpoint.pt").exists()
    periodic.stepped(stages)
    assert (tmp_path / "checkpoint.pt").exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    assert not run(job(), path, StopAfter(4))
    return path


@pytest.mark.parametrize(
    "damage", ["empty", "cut", "text", "bit", "other", "missing", "beyond the end", "large"]
)
def test_damaged_checkpoint_is_refused(
    damage: str, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(interrupted.read_bytes())
    if damage == "empty":
        interrupted.write_bytes(b"")
    elif damage == "cut":
        interrupted.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        interrupted.write_text("not a checkpoint")
    elif damage == "bit":
        content[len(content) // 2] ^= 1
        interrupted.write_bytes(content)
    elif damage == "other":
        torch.save([1, 2, 3], interrupted)
    elif damage == "large":
        with interrupted.open("ab") as file:
            file.write(bytes(2**22))
        monkeypatch.setattr(checkpoints, "MAX_BYTES", 2**22)
    elif damage == "beyond the end":
        state = torch.load(interrupted, weights_only=True)
        state["stages"]["training"]["position"] = 10**6
        torch.save(state, interrupted)
    else:
        state = torch.load(interrupted, weights_only=True)
        del state["stages"]["training"]["learners"]["torch_bn"]
        torch.save(state, interrupted)
    before = interrupted.with_name("checkpoint.pt.before")
    kept = before.read_bytes()
    before.unlink()
    again = job()
    with pytest.raises(CheckpointError) as refused:
        Checkpoint(interrupted, again.identity()).load(again.stages)
    assert str(refused.value) == (
        f"{interrupted} is damaged: start again without --resume, which overwrites it"
    )
    # The one before it serves: of the end of the first epoch of three steps.
    before.write_bytes(kept)
    again = job()
    words: list[str] = []
    assert Checkpoint(interrupted, again.identity(), notify=words.append).load(again.stages)
    assert words == [f"{interrupted} is damaged or missing: using the one before."]
    assert again.stages[0].position == 3
    assert run(again, interrupted, Interruption())
    whole = job()
    assert run(whole, interrupted.with_name("whole.pt"), Interruption())
    assert same(outcome(again), outcome(whole))


def test_signals_before_the_first_step_and_second_ones_interrupt_at_once() -> None:
    with Interruption() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        stop.defer()
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ImportError("no", name="torch_bn"), 2, "torch_bn is not installed: run `make train`"),
        (OSError("disk on fire"), 2, "disk on fire"),
    ],
)
def test_what_ends_the_job_early_is_one_line_and_a_status(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*_: object) -> int:
        raise error

    monkeypatch.setattr(train_mlp, "_job", fails)
    assert train_mlp.main([]) == status
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    monkeypatch.setattr(error, "name", "something else", raising=False)
    if isinstance(error, ImportError):
        with pytest.raises(ImportError):
            train_mlp.main([])


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted.with_name("checkpoint.pt.before").unlink()
    monkeypatch.setattr(checkpoints, "MAX_BYTES", 2**22)
    with zipfile.ZipFile(interrupted, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/zeros", bytes(2**22))
    assert interrupted.stat().st_size < 2**22
    monkeypatch.setattr(zipfile.ZipFile, "testzip", lambda _: pytest.fail("was unpacked"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was unpacked"))
    again = job()
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(interrupted, again.identity()).load(again.stages)


def test_a_full_disk_leaves_the_checkpoint(interrupted: Path) -> None:
    content = interrupted.read_bytes()
    program = (
        "import resource, signal, sys, torch; from pathlib import Path; "
        "from mlp.checkpoint import save_atomically; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)); "
        "path = Path(sys.argv[1]); "
        "save_atomically(torch.ones(100_000), path, path.with_name('kept'))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", program, str(interrupted)], env=environment, capture_output=True
    )
    assert ended.returncode != 0
    assert interrupted.read_bytes() == content
    assert not interrupted.with_name("kept").exists()


def test_a_kill_between_the_two_renames(interrupted: Path) -> None:
    interrupted.unlink()
    again = job()
    assert Checkpoint(interrupted, again.identity(), notify=lambda _: None).load(again.stages)
    assert again.stages[0].position == 3


def test_nothing_in_a_checkpoint_is_executed(interrupted: Path) -> None:
    interrupted.with_name("checkpoint.pt.before").unlink()
    torch.save({"format": 1, "code": subprocess.Popen}, interrupted)
    again = job()
    with pytest.raises(CheckpointError, match="is damaged"):
        Checkpoint(interrupted, again.identity()).load(again.stages)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"placement": "after"}, "its placement is before, this run's is after"),
        ({"batch_size": 8}, "its batch-size is 16, this run's is 8"),
        ({"epochs": 3}, "its epochs is 2, this run's is 3"),
        ({"lr": 0.01}, "its lr is 0.001, this run's is 0.01"),
        ({"seed": 1}, "its seed is 0, this run's is 1"),
        ({"threads": 2}, "its threads is 1, this run's is 2"),
        ({"validate": "full"}, "its validate is short, this run's is full"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, object], words: str, interrupted: Path
) -> None:
    other = job(**changes)
    with pytest.raises(CheckpointError, match=words):
        Checkpoint(interrupted, other.identity()).load(other.stages)


def test_other_data_is_refused(interrupted: Path) -> None:
    other = job()
    identity = other.identity()
    assert str(identity["data"]).startswith("random (sha256 ")
    with pytest.raises(CheckpointError, match=r"its data is random .* this run's is mnist"):
        Checkpoint(interrupted, {**identity, "data": "mnist"}).load(other.stages)


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *OFFLINE, "--placement", "after", "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_at(words: str, number: signal.Signals, process: subprocess.Popen[str]) -> tuple[int, str]:
    """Send the signal once the job has shown `words`; its exit status and the output after."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            process.send_signal(number)
            break
    rest, errors = process.communicate(timeout=60)
    assert not errors.strip()
    return process.returncode, rest


@pytest.mark.usefixtures("restored_threads")
def test_real_signals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train_mlp.main([*OFFLINE, "--placement", "after", "--out", str(tmp_path / "whole")])
    assert whole == 0
    out = tmp_path / "parts"
    status, shown = stop_at("epoch 1/", signal.SIGINT, start(out, "--resume"))
    assert status == 130
    assert f"Interrupted, state saved in {out}: continue with --resume." in shown
    # SIGKILL: goes on from the checkpoint of the last epoch.
    status, _ = stop_at("epoch 3/", signal.SIGKILL, start(out, "--resume"))
    assert status == -signal.SIGKILL
    status, shown = stop_at("seed 1/5", signal.SIGTERM, start(out, "--resume"))
    assert status == 130
    assert "saved" in shown
    # Other settings are refused, and leave the checkpoint as it is.
    capsys.readouterr()
    assert train_mlp.main([*OFFLINE, "--out", str(out), "--resume"]) == 2
    assert "its placement is after, this run's is before" in capsys.readouterr().err
    last = start(out, "--resume")
    shown, errors = last.communicate(timeout=60)
    assert (last.returncode, errors.strip()) == (0, "")
    assert "Resumed from" in shown
    assert "epoch 4/4" not in shown, "a completed stage was run again"

    expected = torch.load(tmp_path / "whole" / "model.pt", weights_only=True)
    found = torch.load(out / "model.pt", weights_only=True)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    reports = [
        json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "whole", out)
    ]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]
    assert not (out / "checkpoint.pt").exists()


@pytest.mark.usefixtures("restored_threads")
def test_nothing_to_resume_and_overwriting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlp.job.Job._plot", lambda self, out: [])
    argv = [*OFFLINE, "--validate", "off", "--out", str(tmp_path)]
    assert train_mlp.main([*argv, "--resume"]) == 0
    assert f"Nothing to resume in {tmp_path}: starting from the beginning." in (
        capsys.readouterr().out
    )
    (tmp_path / "checkpoint.pt").write_text("damaged")
    assert train_mlp.main([*argv, "--resume"]) == 2
    # The fetch that was tried before may have left an empty line of its progress bar.
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "is damaged" in error
    assert "\n" not in error
    assert train_mlp.main(argv) == 0
    assert not (tmp_path / "checkpoint.pt").exists()
    assert f"the interrupted run in {tmp_path} is given up" in capsys.readouterr().out
