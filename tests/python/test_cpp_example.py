"""The C++ example, built as a user would: training, proof, resumption, models from Python."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from idx_files import write_images
from torch import nn

import torch_bn

ROOT = Path(__file__).resolve().parents[2]
PASSED, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it exports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [str(part) for part in command]
    return subprocess.run(words, text=True, capture_output=True, env={**os.environ, "PATH": path})


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's programs, from a copy of its folder far from the rest of the project."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(ROOT / "examples/cpp_libtorch", folder / "source")
    prefixes = f"{torch_bn.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    options = (f"-DCMAKE_PREFIX_PATH={prefixes}", "-DCMAKE_BUILD_TYPE=Debug")
    # Torch's headers take most of the time: they are read once a program, and nothing is optimised.
    quick = ("-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g0", "-DCMAKE_UNITY_BUILD=ON")
    configured = run("cmake", "-S", folder / "source", "-B", folder / "build", *options, *quick)
    if "Could NOT find ZLIB" in configured.stderr:
        pytest.skip("the example needs zlib's headers (Debian: apt-get install zlib1g-dev)")
    assert configured.returncode == 0, configured.stderr
    built = run("cmake", "--build", folder / "build", "--parallel")
    assert built.returncode == 0, built.stdout
    return folder / "build"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("idx"), zipped=("train",))


def train(programs: Path, data: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return run(programs / "train_mlp", "--data", data, "--threads", 1, *more)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_training_learns_and_the_proof_passes(
    programs: Path, data: Path, tmp_path: Path, placement: str
) -> None:
    more = ("--placement", placement, "--epochs", 6, "--checkpoint", tmp_path / "mlp.pt")
    done = train(programs, data, "--batch-size", 32, *more)
    assert done.returncode == PASSED, done.stdout + done.stderr
    assert "The proof passed." in done.stdout
    # 36 steps, of two batch norms and three Dense layers.
    assert "0 wrong of 36 steps" in done.stdout
    assert done.stdout.count(" PASS\n") == (39 if placement == "before" else 43)
    last = next(line for line in done.stdout.splitlines() if line.startswith("epoch 6/6"))
    assert float(last.split("accuracy ")[1].split("%")[0]) > 90


def test_a_wrong_layer_fails_the_proof(programs: Path, data: Path, tmp_path: Path) -> None:
    more = ("--epochs", 2, "--fault", "--checkpoint", tmp_path / "mlp.pt")
    done = train(programs, data, *more)
    assert done.returncode == FAILED
    assert "The proof FAILED." in done.stdout
    assert " FAIL\n" in done.stdout


def test_an_interrupted_run_goes_on_to_the_same_bits(
    programs: Path, data: Path, tmp_path: Path
) -> None:
    def command(name: str) -> list[str]:
        program, file = str(programs / "train_mlp"), str(tmp_path / name)
        more = ("--threads", "1", "--epochs", "20", "--checkpoint", file)
        return [program, "--data", str(data), *more]

    whole = run(*command("whole.pt"))
    with subprocess.Popen(command("parts.pt"), stdout=subprocess.PIPE, text=True) as part:
        assert part.stdout is not None
        while not part.stdout.readline().startswith("epoch 3/"):
            pass
        part.send_signal(signal.SIGINT)
        assert "continue with --resume" in part.stdout.read()
    assert part.returncode == INTERRUPTED
    rest = run(*command("parts.pt"), "--resume")
    assert rest.returncode == whole.returncode == PASSED, rest.stderr
    assert "Resumed from" in rest.stdout
    assert rest.stdout.splitlines()[-40:] == whole.stdout.splitlines()[-40:]
    found, expected = (torch.jit.load(tmp_path / name) for name in ("parts.pt", "whole.pt"))
    states = [dict(archive.named_buffers()) for archive in (found, expected)]
    states = [
        s | dict(a.named_parameters()) for s, a in zip(states, (found, expected), strict=True)
    ]
    assert {"proof.errors", "model.bn1.running_mean"} <= states[0].keys()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_checkpoint_of_another_run_is_refused(programs: Path, data: Path, tmp_path: Path) -> None:
    command = [programs / "train_mlp", "--checkpoint", tmp_path / "mlp.pt"]
    assert run(*command, "--data", data, "--threads", 1, "--epochs", 1).returncode == PASSED
    other = shutil.copytree(data, tmp_path / "data")
    images = other / "t10k-images-idx3-ubyte"
    pixels = bytearray(images.read_bytes())
    pixels[-1] ^= 1
    images.write_bytes(pixels)
    for options in (
        ("--data", data, "--threads", 2),
        ("--data", other, "--threads", 1),
        ("--data", data, "--threads", 1, "--lr", "0.0010000001"),
    ):
        done = run(*command, *options, "--epochs", 2, "--resume")
        assert done.returncode == UNUSABLE
        assert "is of a run with other settings" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "looked for t10k-images-idx3-ubyte"),
        (lambda file: file.write_bytes(b"\0\0\x08\x03\0\0"), "cut header"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "fewer bytes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\0"), "more bytes"),
        (lambda file: file.write_bytes(b"\1" + file.read_bytes()[1:]), "wrong magic number"),
        (lambda file: file.write_bytes(gzip.compress(file.read_bytes())[:-9]), "cut or corrupt"),
        (lambda file: file.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12), "more than 2^28 bytes"),
    ],
)
def test_unusable_data_are_refused_in_words(
    programs: Path, data: Path, tmp_path: Path, change: object, words: str
) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    assert callable(change)
    change(folder / "t10k-images-idx3-ubyte")
    done = run(programs / "train_mlp", "--data", folder, "--checkpoint", tmp_path / "mlp.pt")
    assert done.returncode == UNUSABLE
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--epochs", "0"), "--epochs takes a whole number"),
        (("--batch-size", "1"), "--batch-size takes a whole number"),
        (("--lr", "nan"), "--lr takes a positive number"),
        (("--placement", "beside"), "'before' or 'after'"),
        (("--seed",), "without its value"),
        (("--what", "1"), "unknown option --what"),
    ],
)
def test_wrong_options_are_refused_in_words(
    programs: Path, data: Path, options: tuple[str, ...], words: str
) -> None:
    done = run(programs / "train_mlp", "--data", data, *options)
    assert (done.returncode, words in done.stderr) == (UNUSABLE, True), done.stderr


def test_models_exported_from_python_run(programs: Path, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), torch_bn.BatchNorm1d(5), nn.ReLU())
    model(torch.randn(20, 6))
    model.eval()
    x = torch.arange(24.0).sin().view(4, 6)
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    expected = model(x)
    # What is compiled may fold batch norm into the Linear and sum its 6 terms in another order: a
    # dozen float32 roundings, each 6e-8 of a result below 5.
    for name, tolerance in (("model.pt", 0.0), ("model.pt2", 4e-6)):
        done = run(programs / "run_model", tmp_path / name, 4, 6)
        assert done.returncode == 0, done.stderr
        rows = [[float(value) for value in line.split()] for line in done.stdout.splitlines()]
        torch.testing.assert_close(torch.tensor(rows), expected, rtol=0, atol=tolerance)
    for name in ("model.pt", "model.pt2"):
        whole = (tmp_path / name).read_bytes()
        for content in (b"", b"not a model", whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(content)
            done = run(programs / "run_model", tmp_path / name, 4, 6)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert done.stderr.startswith("error: ")
    for counts in (("0", "6"), ("4", "six"), ("4", "-6"), ("4", "99999999999999999999")):
        done = run(programs / "run_model", tmp_path / "model.pt", *counts)
        assert (done.returncode, done.stderr) == (2, "usage: run_model MODEL ROWS FEATURES\n")
