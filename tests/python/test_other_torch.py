"""A build against a second torch, where there is one: TORCH_BN_OTHER_PYTHON names its Python.

That environment needs what a build needs (setuptools, cmake, ninja, pybind11) beside its torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from elsewhere import python
from mutate import source_files

ROOT = Path(__file__).resolve().parents[2]
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


@pytest.mark.skipif(not OTHER, reason="TORCH_BN_OTHER_PYTHON names no Python with another torch")
def test_a_build_for_another_torch_works_there_and_is_refused_here(tmp_path: Path) -> None:
    found = python("import torch; print(torch.__version__)", tmp_path, OTHER)
    minor = found.stdout.strip().split(".")[:2]
    assert minor != torch.__version__.split(".")[:2], "it is to be another minor version"

    source, site = tmp_path / "source", tmp_path / "site"
    for name in source_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [OTHER, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target"]
    installed = subprocess.run([*pip, str(site), str(source)], text=True, capture_output=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr

    there = python(STEP, site, OTHER)
    assert there.returncode == 0, there.stderr
    built_for, file = there.stdout.split()
    assert built_for.split(".")[:2] == minor
    assert Path(file).is_relative_to(site)
    here = python("import torch_bn", site)
    assert here.returncode == 1
    words = here.stderr.strip().splitlines()[-1]
    assert words.startswith("ImportError: ")
    assert f"built for torch {built_for} but torch {torch.__version__} is installed" in words
