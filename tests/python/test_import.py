"""What `import torch_bn` does, and what it says when it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from elsewhere import python

import torch_bn

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
PACKAGE = Path(torch_bn.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package without its C++ side's headers, to be damaged."""
    shutil.copytree(
        PACKAGE, tmp_path / "torch_bn", ignore=shutil.ignore_patterns("include", "share", "*.pyc")
    )
    return tmp_path / "torch_bn"


def refusal(copy: Path) -> str:
    done = python("import torch_bn", copy.parent)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError: "), done.stderr
    assert REBUILD in last
    return last


def test_the_copy_itself_is_whole(copy: Path) -> None:
    done = python("import torch_bn; print(torch_bn.__file__)", copy.parent)
    assert done.stdout.strip() == str(copy / "__init__.py"), done.stderr


def test_another_torch_minor_is_refused_by_name(copy: Path) -> None:
    (copy / "_build_config.py").write_text('torch_version = "2.12.1"\n')
    words = refusal(copy)
    assert f"built for torch 2.12.1 but torch {torch.__version__} is installed" in words


def test_another_patch_of_the_same_minor_is_taken(copy: Path) -> None:
    minor = ".".join(torch.__version__.split(".")[:2])
    (copy / "_build_config.py").write_text(f'torch_version = "{minor}.99"\n')
    assert python("import torch_bn", copy.parent).returncode == 0


def test_a_package_that_was_not_built(copy: Path) -> None:
    (copy / "_build_config.py").unlink()
    assert "its C++ library is missing" in refusal(copy)


def test_a_missing_library(copy: Path) -> None:
    (copy / "lib/libtorch_bn.so").unlink()
    assert "libtorch_bn.so" in refusal(copy)


# What torch itself has not imported is loaded by those who use it: exporters, compilers, plots.
def test_import_adds_no_module_of_weight_and_changes_no_setting() -> None:
    code = """import random, sys, warnings, torch
def settings():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().tolist(),
            random.getstate(), list(warnings.filters), torch.nn.BatchNorm1d.forward)
before, modules = settings(), set(sys.modules)
import torch_bn
assert settings() == before
roots = {name.split(".")[0] for name in set(sys.modules) - modules}
print(*sorted(roots - set(sys.stdlib_module_names) - {"torch_bn"}))
print(*sorted(name for name in set(sys.modules) - modules if name.startswith("torch.")))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_all_names_everything_public_and_nothing_else() -> None:
    public = {
        name
        for name, value in vars(torch_bn).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("torch_bn.")
    }
    assert public <= set(torch_bn.__all__)
    assert all(hasattr(torch_bn, name) for name in torch_bn.__all__)
    assert len(set(torch_bn.__all__)) == len(torch_bn.__all__)
