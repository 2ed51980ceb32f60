"""The training job as a whole: its command line, what it writes, and that wrong layers fail it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_mlp
from idx_files import write_images
from matplotlib import image
from torch import Tensor, nn

import torch_bn
from mlp import options

PLOTS = ("curves.png", "per_step.png", "free_float64.png", "free_float32.png")


pytestmark = pytest.mark.usefixtures("restored_threads")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("idx"))


def run(data: Path, out: Path, *more: str, layer: Any = None) -> int:
    argv = ["--data", str(data), "--out", str(out), "--threads", "1", "--epochs", "2", *more]
    return train_mlp.main(argv, layer)


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_BN_MNIST", raising=False)
    found = options.parse([])
    assert found == options.Options(
        settings=options.Settings(
            placement="before",
            epochs=10,
            batch_size=64,
            optimizer="adam",
            lr=1e-3,
            seed=0,
            dtype="float32",
            threads=torch.get_num_threads(),
            preprocess="zscore",
            validate="short",
        ),
        data=None,
        data_url=options.DEFAULT_URL,
        cache=None,
        out=Path("runs/mlp-before"),
        resume=False,
    )
    assert options.parse(["--placement", "after"]).out == Path("runs/mlp-after")


def test_data_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_BN_MNIST", "somewhere")
    assert options.parse([]).data == Path("somewhere")
    assert options.parse(["--data", "elsewhere"]).data == Path("elsewhere")
    monkeypatch.setenv("TORCH_BN_MNIST", "")
    assert options.parse([]).data is None


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ("--placement inside", "--placement: invalid choice: 'inside'"),
        ("--epochs 0", "--epochs: 0 is not between 1 and"),
        ("--epochs two", "--epochs: 'two' is not a whole number"),
        ("--batch-size 1", "--batch-size: 1 is not between 2 and"),
        ("--lr 0", "--lr: 0 is not a positive, finite number"),
        ("--lr inf", "--lr: inf is not a positive, finite number"),
        ("--lr nan", "--lr: nan is not a positive, finite number"),
        ("--lr fast", "--lr: 'fast' is not a number"),
        ("--seed -1", "--seed: -1 is not between 0 and"),
        ("--threads 0", "--threads: 0 is not between 1 and"),
        ("--dtype float16", "--dtype: invalid choice"),
        ("--optimizer lion", "--optimizer: invalid choice"),
        ("--preprocess whiten", "--preprocess: invalid choice"),
        ("--validate some", "--validate: invalid choice"),
        ("--device cuda", "unrecognized arguments: --device cuda"),
        ("--fused --placement none", "--fused: placement none has no batch norm to fuse"),
    ],
)
def test_wrong_arguments(argv: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_mlp.main(argv.split())
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err


def test_unusable_data_and_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "nowhere: no such directory" in error
    assert error.count("\n") == 1
    (tmp_path / "file").touch()
    assert run(data, tmp_path / "file") == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_an_instruction_set_that_is_not_there(data: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, train_mlp.__file__, "--data", data, "--out", tmp_path],
        env={**os.environ, "TORCH_BN_ISA": "sse9"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: TORCH_BN_ISA=sse9: unknown instruction set; valid names are ")


@pytest.mark.parametrize(
    ("placement", "dtype", "more"),
    [
        ("before", "float32", ()),
        ("after", "float32", ("--optimizer", "sgd", "--lr", "0.05")),
        ("before", "float64", ("--preprocess", "minmax")),
        ("after", "float64", ("--batch-size", "16")),
    ],
)
def test_job(
    placement: str,
    dtype: str,
    more: tuple[str, ...],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(data, tmp_path, "--placement", placement, "--dtype", dtype, *more) == 0
    shown = capsys.readouterr().out
    for words in ("epoch 2/2  torch_bn: loss", "1 per step", "2 free-running float64", "PASS"):
        assert words in shown
    assert "FAIL" not in shown
    found = report(tmp_path)
    assert set(found) == {
        *("passed", "settings", "versions", "data", "seconds", "test", "weights_sha256"),
        *("proofs", "epochs"),
    }
    assert found["passed"] is True
    assert [proof["passed"] for proof in found["proofs"]] == [True] * 3
    assert found["settings"]["placement"] == placement
    assert (found["data"]["train"], found["data"]["validation"]) == (189, 21)
    variants = {"torch_bn", "torch.nn", "no BN"}
    assert set(found["test"]) == set(found["weights_sha256"]) == set(found["epochs"]) == variants
    assert all(len(curve) == 2 for curve in found["epochs"].values())
    assert found["proofs"][0]["figures"]["steps"] == list(range(6 if "16" not in more else 24))
    # The weights load into the plain torch layer.
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    nn.BatchNorm1d(300).load_state_dict(
        {key.removeprefix("bn1."): value for key, value in state.items() if key.startswith("bn1.")}
    )
    assert state["dense3.weight"].dtype == options.DTYPES[dtype]
    for name in PLOTS:
        pixels = image.imread(tmp_path / name)
        assert pixels.shape[0] > 400
        assert pixels.shape[1] > 800
        assert pixels[..., :3].std() > 0.05, f"{name} is blank"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*PLOTS, "model.pt", "report.json"]
    ), "a checkpoint or a partial file was left behind"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--placement", "none"), "placement none has no batch norm to prove"),
        (("--validate", "off"), "switched off by --validate off"),
    ],
)
def test_job_without_proofs(
    more: tuple[str, ...],
    reason: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(data, tmp_path, *more) == 0
    assert f"Proofs: not run, {reason}." in capsys.readouterr().out
    found = report(tmp_path)
    assert found["proofs"] == []
    assert set(found["epochs"]) == (
        {"no BN"} if "none" in more else {"torch_bn", "torch.nn", "no BN"}
    )
    assert (tmp_path / "curves.png").exists()
    assert not (tmp_path / "per_step.png").exists()


def test_proofs_do_not_change_the_training(data: Path, tmp_path: Path) -> None:
    digests = []
    for validate in ("off", "full"):
        assert run(data, tmp_path / validate, "--validate", validate) == 0
        digests.append(report(tmp_path / validate)["weights_sha256"])
    assert digests[0] == digests[1]


class _Wrong(torch.autograd.Function):
    """Batch norm in training as the definition says, but for the `fault`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, fault: str
    ) -> Tensor:
        correction = 1 if fault == "unbiased variance in normalising" else 0
        eps = 2 * eps if fault == "doubled eps" else eps
        invstd = torch.rsqrt(x.var(0, correction=correction) + eps)
        normalised = (x - x.mean(0)) * invstd
        ctx.save_for_backward(normalised, weight, invstd)
        ctx.fault = fault
        return normalised * weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        normalised, weight, invstd = ctx.saved_tensors
        centred = grad
        if ctx.fault != "no mean(g) in grad_input":
            centred = centred - grad.mean(0)
        if ctx.fault != "no mean(g * normalised) in grad_input":
            centred = centred - normalised * (grad * normalised).mean(0)
        return centred * weight * invstd, (grad * normalised).sum(0), grad.sum(0), None, None


class _WrongNorm(nn.BatchNorm1d):
    fault = "none"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            if self.fault != "wrong in evaluation":
                return super().forward(x)
            return super().forward(x) + 1e-5
        with torch.no_grad():
            momentum = 0.11 if self.fault == "wrong momentum" else self.momentum
            correction = 0 if self.fault == "biased variance in running_var" else 1
            self.running_mean.lerp_(x.mean(0), momentum)
            self.running_var.lerp_(x.var(0, correction=correction), momentum)
            if self.fault != "counter not advanced":
                self.num_batches_tracked.add_(1)
        return _Wrong.apply(x, self.weight, self.bias, self.eps, self.fault)


STEP, FLOAT64 = "per step", "free-running float64"
FAULTS = {
    "none": set(),
    "biased variance in running_var": {STEP},
    "unbiased variance in normalising": {STEP, FLOAT64},
    "wrong momentum": {STEP},
    "no mean(g) in grad_input": {STEP, FLOAT64},
    "no mean(g * normalised) in grad_input": {STEP, FLOAT64},
    "counter not advanced": {STEP},
    "doubled eps": {STEP, FLOAT64},
    "wrong in evaluation": {STEP},
}


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_layer_fails(
    fault: str,
    placement: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Pictures take most of a job this small, and other tests look at them.
    monkeypatch.setattr("mlp.job.Job._plot", lambda self, out: [])
    layer = type("Layer", (_WrongNorm,), {"fault": fault})
    status = run(data, tmp_path, "--placement", placement, layer=layer)
    found = report(tmp_path)
    failed = {proof["name"] for proof in found["proofs"] if not proof["passed"]}
    assert failed == FAULTS[fault]
    assert status == (1 if failed else 0)
    assert found["passed"] is not bool(failed)
    last = capsys.readouterr().out.splitlines()[-1]
    assert all(f"FAILED: {STEP}" in last and name in last for name in failed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("placement", ["after", "before"])
def test_fused_layers_pass_every_proof(
    placement: str, dtype: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    names = ("BatchNormReLU1d", "ReLUBatchNorm1d")
    for name in names:
        cls = getattr(torch_bn, name)
        forward = cls.forward

        def watched(self: Any, x: Tensor, forward: Any = forward, name: str = name) -> Tensor:
            seen.append(name)
            return forward(self, x)

        monkeypatch.setattr(cls, "forward", watched)
    assert run(data, tmp_path, "--placement", placement, "--dtype", dtype, "--fused") == 0
    found = report(tmp_path)
    assert found["settings"]["fused"] is True
    assert [proof["passed"] for proof in found["proofs"]] == [True] * 3
    assert set(seen) == {names[placement == "after"]}
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert "bn1.running_mean" in state


def test_layer_that_learns_nothing_fails_every_proof(data: Path, tmp_path: Path) -> None:
    class Deaf(torch_bn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    assert run(data, tmp_path, "--epochs", "12", layer=Deaf) == 1
    assert [proof["passed"] for proof in report(tmp_path)["proofs"]] == [False] * 3


@pytest.mark.skipif(
    not os.environ.get("TORCH_BN_MNIST"),
    reason="the environment variable TORCH_BN_MNIST does not name a directory with MNIST",
)
def test_real_mnist(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status = train_mlp.main(["--epochs", "1", "--threads", "1", "--out", str(out)])
    assert status in (0, 1), "the job did not run"
    found = report(out)
    assert status == 0, [line for proof in found["proofs"] for line in proof["lines"]]
    assert (found["data"]["train"], found["data"]["test"]) == (54_000, 10_000)
    # One epoch gives 96 to 97 %; without learning it would be 10.
    assert found["test"]["torch_bn"]["accuracy"] > 0.95
