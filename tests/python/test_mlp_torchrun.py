"""The training job in several processes under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_mlp

SCRIPT = Path(train_mlp.__file__)
# Nothing listens on port 9 of this machine: the job falls back on the digits at once, 20 batches.
OFFLINE = ["--data-url", "http://127.0.0.1:9/", "--threads", "1", "--validate", "off"]
SECONDS = 120

# In rank 1's 31st step, and only the first time that torchrun starts it, something happens.
IN_STEP_31 = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train_mlp
from mlp.training import Training
advance = Training.advance
def dying(self):
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and self.position == 30:
        {happens}
    return advance(self)
Training.advance = dying
sys.exit(train_mlp.main())
"""


DYING = IN_STEP_31.replace("{happens}", "os.kill(os.getpid(), signal.SIGKILL)")
# As a cluster's scheduler does before it takes the machine away.
TERMINATED = IN_STEP_31.replace("{happens}", "os.kill(os.getppid(), signal.SIGTERM)")

# Gloo's threads have ended where the job has: one that frees a tensor of Python's while Python ends
# aborts the process.
ENDING = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import train_mlp
status = train_mlp.main()
threads = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
assert not any("gloo" in name for name in threads), threads
sys.exit(status)
"""


def start(processes: int, out: Path, *arguments: str, program: str | None = None) -> Any:
    """The job's output; `processes` 0 is without torchrun, `program` runs in the job's place."""
    command = [sys.executable, "-W", "ignore"]
    if processes:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--standalone", "--local-addr", "127.0.0.1", "--max-restarts", "1"]
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("TORCH_BN_MNIST", None)
    script = [str(SCRIPT)]
    if program:
        out.parent.mkdir(parents=True, exist_ok=True)
        wrapper = out.parent / "program.py"
        wrapper.write_text(program)
        script = [str(wrapper), str(SCRIPT.parent)]
    return subprocess.run(
        [*command, *script, *OFFLINE, "--out", str(out), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    result: dict[str, torch.Tensor] = torch.load(out / "model.pt", weights_only=True)
    return result


@pytest.mark.parametrize(("placement", "epochs"), [("before", "1"), ("after", "5")])
def test_as_one_process(placement: str, epochs: str, tmp_path: Path) -> None:
    """Two processes that share each batch end with the weights of one with the whole batch.

    With the ReLU first they do each batch norm and its ReLU in one.
    """
    options = ["--placement", placement, "--epochs", epochs, "--dtype", "float64"]
    alone = start(0, tmp_path / "alone", *options)
    assert alone.returncode == 0, alone.stderr
    fused = ["--fused"] if placement == "after" else []
    two = start(2, tmp_path / "two", "--sync-bn", *fused, *options, program=ENDING)
    assert two.returncode == 0, two.stderr
    want, got = weights(tmp_path / "alone"), weights(tmp_path / "two")
    apart = {name: (got[name] - want[name]).abs().max().item() for name in want}
    # An epoch of 20 steps; with the ReLU first, five of them, where roundings grow tenfold in
    # dozens of steps.
    assert max(apart.values()) < (1e-10 if placement == "before" else 1e-9), apart
    if placement == "before":
        # The comparison can fail: statistics of each share alone make another training.
        assert start(2, tmp_path / "local", *options).returncode == 0
        local = weights(tmp_path / "local")
        assert (local["dense1.weight"] - want["dense1.weight"]).abs().max() > 1e-6
    # Rank 0 alone prints, the same lines.
    line = f"epoch {epochs}/{epochs}  torch_bn: loss "
    found = [[x for x in each.stdout.splitlines() if line in x] for each in (alone, two)]
    assert len(found[0]) == len(found[1]) == 1
    assert found[0][0].split("(")[0] == found[1][0].split("(")[0]


def test_restarted_after_a_kill(tmp_path: Path) -> None:
    options = ["--epochs", "3", "--sync-bn", "--resume"]
    whole = start(2, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    broken = start(2, tmp_path / "broken", *options, program=DYING)
    assert broken.returncode == 0, broken.stderr
    assert "Resumed from" in broken.stdout
    assert "20 of 60 steps are done" in broken.stdout
    assert "failed (exitcode: -9) local_rank: 1" in broken.stderr
    want, got = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_resumed_after_torchrun_was_terminated(tmp_path: Path) -> None:
    options = ["--epochs", "3", "--sync-bn", "--resume"]
    whole = start(2, tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr
    broken = start(2, tmp_path / "broken", *options, program=TERMINATED)
    assert broken.returncode != 0
    assert "Interrupted, state saved in" in broken.stdout, broken.stderr
    assert not (tmp_path / "broken" / "model.pt").exists()
    resumed = start(2, tmp_path / "broken", *options)
    assert resumed.returncode == 0, resumed.stderr
    # Of the step in which the signal came, or of the next: rank 0 may have been ahead.
    assert any(f": {done} of 60 steps are done." in resumed.stdout for done in (30, 31, 32))
    want, got = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_backend_that_torch_has_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.distributed.is_mpi_available():
        pytest.skip("this torch has MPI")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_mlp.main(["--backend", "mpi"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the processes cannot be joined by 'mpi': ")


@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        ({"WORLD_SIZE": "2"}, ["--validate", "full"], "under torchrun it is off"),
        ({}, ["--sync-bn"], "start several with torchrun"),
        (
            {"WORLD_SIZE": "2"},
            ["--sync-bn", "--placement", "none"],
            "--sync-bn: placement none has no batch norm to synchronise",
        ),
    ],
)
def test_wrong_usage(
    environment: dict[str, str],
    arguments: list[str],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train_mlp.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
