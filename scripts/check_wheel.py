"""Looks at a wheel of torch_bn, and at what is installed from it beside torch alone."""

from __future__ import annotations

import sys
import warnings
import zipfile
from pathlib import Path

LARGEST = 5_000_000
INSIDE = (
    "torch_bn/lib/libtorch_bn.so",
    "torch_bn/include/torch_bn/torch_bn.h",
    "torch_bn/share/cmake/torch_bn/torch_bnConfig.cmake",
    "torch_bn/py.typed",
    "torch_bn/_C.pyi",
)


def check_file(wheel: Path) -> None:
    """Tag, size, and what is in it and what is not."""
    assert "-manylinux_" in wheel.name, f"{wheel.name} has no manylinux tag"
    assert wheel.stat().st_size < LARGEST, f"{wheel.name} has {wheel.stat().st_size} bytes"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    missing = [name for name in INSIDE if name not in names]
    assert not missing, f"not in the wheel: {missing}"
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence in the wheel"
    libraries = {Path(name).name.split(".")[0] for name in names if ".so" in Path(name).name}
    assert libraries == {"libtorch_bn", "_C"}, f"libraries in the wheel: {libraries}"


def check_installed() -> None:
    """The layer trains, and the process has one OpenMP runtime."""
    warnings.simplefilter("ignore")  # torch's, where there is no numpy
    import torch

    import torch_bn

    layer = torch_bn.BatchNorm1d(3)
    layer(torch.randn(8, 3)).square().sum().backward()
    assert layer.weight.grad is not None
    assert Path(torch_bn.__file__).is_relative_to(sys.prefix), torch_bn.__file__
    maps = Path("/proc/self/maps").read_text().split("\n")
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1, f"OpenMP runtimes in the process: {runtimes}"


if __name__ == "__main__":
    wheel = Path(sys.argv[1])
    check_file(wheel)
    check_installed()
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, imports with torch alone")
