"""A build against a second torch, where there is one: TORCH_BN_OTHER_PYTHON names its Python.

That environment needs what a build needs (setuptools, cmake, ninja, pybind11) beside its torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "cmake", "torch_bn", "CMakeLists.txt", "setup.py", "pyproject.toml")
DOCUMENTS = ("README.md", "LICENSE")
BUILT = ("lib", "include", "share", "_C*.so", "_build_config.py", "__pycache__")
OTHER = os.environ.get("TORCH_BN_OTHER_PYTHON", "")

STEP = """import torch, torch_bn
torch.manual_seed(0)
x = torch.randn(20, 5)
ours, theirs = torch_bn.BatchNorm1d(5), torch.nn.BatchNorm1d(5)
for layer in (ours, theirs):
    layer(x).pow(3).sum().backward()
for name in ("running_mean", "running_var"):
    torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
print(torch_bn.build_info()["torch_version"], torch_bn.__file__)
"""


def run(python: str, *arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    return subprocess.run(
        [python, *map(str, arguments)], env=environment, text=True, capture_output=True, cwd=path
    )


@pytest.mark.skipif(not OTHER, reason="TORCH_BN_OTHER_PYTHON names no Python with another torch")
def test_a_build_for_another_torch_works_there_and_is_refused_here(tmp_path: Path) -> None:
    found = run(OTHER, "-c", "import torch; print(torch.__version__)", path=tmp_path)
    version = found.stdout.strip()
    minor = version.split(".")[:2]
    assert minor != torch.__version__.split(".")[:2], "it is to be another minor version"

    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    site.mkdir()
    for name in (*SOURCES, *DOCUMENTS):
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns(*BUILT) if name == "torch_bn" else None
            shutil.copytree(ROOT / name, source / name, ignore=built)
        else:
            shutil.copy(ROOT / name, source / name)
    pip = ("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", site, source)
    installed = run(OTHER, *pip, path=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    there = run(OTHER, "-c", STEP, path=site)
    assert there.returncode == 0, there.stderr
    built_for, file = there.stdout.split()
    assert built_for.split(".")[:2] == minor
    assert Path(file).is_relative_to(site)
    # Found before an editable install of the project, which has a finder of its own.
    isolated = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in repr(f)]"
    )
    here = run(sys.executable, "-c", f"{isolated}; import torch_bn", path=site)
    assert here.returncode == 1
    words = here.stderr.strip().splitlines()[-1]
    assert words.startswith("ImportError: ")
    assert f"built for torch {built_for} but torch {torch.__version__} is installed" in words
