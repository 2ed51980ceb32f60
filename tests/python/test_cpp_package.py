"""The C++ library as others find it: installed, in the wheel, linked by a foreign CMake project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torch_bn

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = ROOT / "tests/consumer"
BUILD = ROOT / os.environ.get("BUILD", "build/dev")
TORCH = Path(torch.__file__).parent

pytestmark = [
    pytest.mark.skipif(
        not (BUILD / "CMakeCache.txt").exists(),
        reason=f"no build of the library in {BUILD}: `make test` makes one",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of TorchScript
]


def run(*command: object, env: dict[str, str] | None = None) -> str:
    """Run a command and return what it printed; fail the test with that when it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PATH": path, **(env or {})},
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def configure(source: Path, build: Path, prefixes: list[Path], *more: str) -> str:
    prefix_path = ";".join(str(prefix) for prefix in prefixes)
    flags = "-DCMAKE_CXX_FLAGS=-O0 -g0"
    return run(
        *("cmake", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix_path}", flags, *more)
    )


def needed(library: Path) -> list[str]:
    return re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", library))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library, shared and as an archive, moved once installed, to a path with a blank."""
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "-S", ROOT, "-B", BUILD, "-DTORCH_BN_STATIC=ON")
    run("cmake", "--build", BUILD, "--target", "torch_bn", "torch_bn_archive")
    run("cmake", "--install", BUILD, "--prefix", folder / "first")
    return (folder / "first").rename(folder / "moved there")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like site-packages, with torch and the unpacked wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for stale in (ROOT / "build").glob("lib.*"):  # setuptools would pack what lies there
        shutil.rmtree(stale)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--quiet")
    run(*pip, "-w", folder, ROOT, env={"TORCH_BN_BUILD_DIR": str(BUILD)})
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    (folder / "site/torch").symlink_to(TORCH)
    return folder / "site"


@pytest.fixture(scope="module")
def programs(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The foreign project built against the install tree."""
    build = tmp_path_factory.mktemp("consumer")
    configure(CONSUMER, build, [installed, TORCH])
    run("cmake", "--build", build, "--parallel")
    return build


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), torch_bn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def data() -> Tensor:
    return torch.arange(48.0).view(8, 6).remainder(7).div(4)


def trained(steps: int, model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.125)
    for step in range(steps):
        optimizer.zero_grad()
        model(data() + step).square().sum().backward()
        optimizer.step()
    return model


def check_training(program: Path, folder: Path) -> None:
    """C++ takes a state that Python has trained, and trains on to the bits that Python has."""
    model = trained(2, Net())
    torch.save(dict(model.state_dict()), folder / "state.pt")
    printed = run(program, folder / "state.pt", folder / "result.pt")
    assert "torch_bn::BatchNorm1d(5, eps=1e-05" in printed
    # What C++ writes has a type tag that weights_only does not know.
    found = torch.load(folder / "result.pt", weights_only=False)
    trained(3, model).eval()
    assert torch.equal(found.pop("output"), model(data()))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["", "_static"], ids=["shared", "static"])
def test_a_program_trains_to_the_bits_of_python(programs: Path, form: str, tmp_path: Path) -> None:
    program = programs / f"train{form}"
    check_training(program, tmp_path)
    assert ("libtorch_bn.so" in needed(program)) == (form == "")


@pytest.mark.parametrize("form", ["", "_static"], ids=["shared", "static"])
def test_registrations_live_in_a_program_that_names_no_symbol(
    programs: Path, form: str, tmp_path: Path
) -> None:
    model = trained(2, Net()).eval()
    torch.jit.script(model).save(str(tmp_path / "model.pt"))
    printed = run(programs / f"load{form}", tmp_path / "model.pt")
    found = torch.tensor([float(line) for line in printed.split()]).view(8, 3)
    assert torch.equal(found, model(data()))


def test_no_python_in_the_link_line(installed: Path, programs: Path) -> None:
    for file in (installed / "lib/libtorch_bn.so", programs / "train", programs / "load_static"):
        assert not [name for name in needed(file) if "python" in name]
    assert "python" not in run("ldd", programs / "train").lower().replace(str(TORCH).lower(), "")


def test_installed_files_name_no_folder_of_the_build(installed: Path) -> None:
    files = list((installed / "share/cmake/torch_bn").iterdir())
    assert {"torch_bnConfig.cmake", "torch_bnConfigVersion.cmake"} <= {file.name for file in files}
    for file in files:
        for folder in (ROOT, BUILD, TORCH, installed.parent):
            assert str(folder) not in file.read_text(), file


def test_the_wheel_has_library_headers_and_config(site: Path, installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return {str(path) for path in found if path.parts[0] in ("include", "lib", "share")}

    of_archive = {name for name in files(installed) if name.endswith(".a") or "Static" in name}
    assert files(site / "torch_bn") == files(installed) - of_archive
    assert files(Path(torch_bn.cmake_prefix_path)) >= files(site / "torch_bn")


# One path, that of the package, is enough: torch lies beside it.
def test_a_program_is_built_against_the_wheel(site: Path, tmp_path: Path) -> None:
    configure(CONSUMER, tmp_path / "build", [site / "torch_bn"])
    run("cmake", "--build", tmp_path / "build", "--target", "train")
    assert not (tmp_path / "build/train_static").exists()
    check_training(tmp_path / "build/train", tmp_path)


def test_another_torch_is_refused_in_words(installed: Path, tmp_path: Path) -> None:
    fake = tmp_path / "torch/share/cmake/Torch"
    fake.mkdir(parents=True)
    (fake / "TorchConfig.cmake").touch()
    (fake / "TorchConfigVersion.cmake").write_text('set(PACKAGE_VERSION "2.12.1")\n')
    with pytest.raises(AssertionError) as refusal:
        configure(CONSUMER, tmp_path / "build", [installed], f"-DTorch_DIR={fake}")
    words = " ".join(str(refusal.value).split())
    assert (
        "was built for torch 2.13 and has the ABI of no other, but torch 2.12.1 was found" in words
    )


def test_another_version_is_refused(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.25)\nproject(later CXX)\n"
        "find_package(torch_bn 0.99 REQUIRED)\n"
    )
    with pytest.raises(AssertionError, match=r"version \"0.99\"") as refusal:
        configure(tmp_path, tmp_path / "build", [installed, TORCH])
    assert f"version: {torch_bn.__version__}" in str(refusal.value)
