"""Loads the C++ library, whose loading registers the operators ``torch.ops.torch_bn.*``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _load() -> Any:
    try:
        from torch_bn._build_config import torch_version
    except ImportError as error:
        raise ImportError(
            "torch_bn was not built: its C++ library is missing. Build it in a copy of the "
            f"sources with '{_REBUILD}'."
        ) from error
    # A C++ autograd function has the ABI of one torch minor version only.
    if _minor(torch_version) != _minor(torch.__version__):
        raise ImportError(
            f"torch_bn was built for torch {torch_version} but torch {torch.__version__} is "
            f"installed. Install torch {_minor(torch_version)}, or rebuild torch_bn for this "
            f"one in a copy of its sources with '{_REBUILD}'."
        )
    try:
        from torch_bn import _C
    except ImportError as error:
        raise ImportError(
            f"torch_bn's C++ library could not be loaded ({error}). Rebuild it in a copy of "
            f"the sources with '{_REBUILD}'."
        ) from error
    return _C


_C = _load()


def build_info() -> dict[str, Any]:
    """Tell what was built, with which torch, and what runs.

    Returns:
        A dict with ``version`` (of torch_bn), ``torch_version`` (compiled against), ``compiler``,
        ``openmp`` (the date of the OpenMP standard, yyyymm), ``isas_built`` and
        ``isas_supported`` (instruction sets, weakest first) and ``isa`` (the one in use).

    Raises:
        RuntimeError: at the import of ``torch_bn`` already, if the environment variable
            ``TORCH_BN_ISA`` holds an unknown name or an instruction set that this processor lacks.

    Example:
        >>> import torch_bn
        >>> info = torch_bn.build_info()
        >>> info["isa"] in info["isas_supported"]
        True
    """
    info: dict[str, Any] = _C.build_info()
    return info


__version__: str = build_info()["version"]

cmake_prefix_path: str = str(Path(__file__).resolve().parent)
"""Where CMake's ``find_package(torch_bn)`` finds the C++ library, headers and package config.

>>> import torch_bn
>>> (Path(torch_bn.cmake_prefix_path) / "include/torch_bn/torch_bn.h").is_file()
True
"""
