"""Drives the one build, CMake's, and puts what it installs into the Python package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures, builds and installs the C++ side with CMake."""

    def build_extension(self, ext: Extension) -> None:
        """Install libtorch_bn, its headers and the module ``_C`` into the package's folder."""
        import pybind11
        import torch

        built = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target = ROOT / "torch_bn" if self.editable_mode else built
        # An editable install shares its build tree with the C++ tests: nothing is compiled twice.
        build = Path(os.environ.get("TORCH_BN_BUILD_DIR", self.build_temp)).resolve()
        build.mkdir(parents=True, exist_ok=True)
        prefixes = [torch.utils.cmake_prefix_path, pybind11.get_cmake_dir()]
        configure = [
            "cmake",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_PREFIX_PATH={';'.join(prefixes)}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DTORCH_BN_PYTHON=ON",
        ]
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            configure.append("-GNinja")
        jobs = str(self.parallel or os.cpu_count() or 1)
        for command in (
            configure,
            ["cmake", "--build", str(build), "--parallel", jobs, "--target", "torch_bn", "_C"],
            *(
                ["cmake", "--install", str(build), "--prefix", str(target), "--component", part]
                for part in ("library", "python")
            ),
        ):
            subprocess.run(command, check=True)

    def copy_extensions_to_source(self) -> None:
        """Leave an editable install as it is: CMake has installed it in place already."""


# A build has the ABI of one minor version of torch.
minor = ".".join(version("torch").split(".")[:2])

setup(
    install_requires=[f"torch=={minor}.*"],
    ext_modules=[Extension("torch_bn._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
