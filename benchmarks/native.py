"""Builds and loads floor/floor.cpp, once, into build/bench."""

from __future__ import annotations

import functools
import os
import sysconfig
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
BUILD = _HERE.parent / "build" / "bench"


@functools.cache
def floor() -> ModuleType | str:
    """The extension, or in words why there is none."""
    # Imported here: the import looks for compilers, and says so.
    from torch.utils import cpp_extension

    build = BUILD / "floor"
    build.mkdir(parents=True, exist_ok=True)
    # ninja may lie in the environment whose python runs, though the environment is not activated.
    scripts = sysconfig.get_path("scripts")
    if scripts not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join((os.environ["PATH"], scripts))
    try:
        return cpp_extension.load(
            name="torch_bn_floor",
            sources=[str(_HERE / "floor" / "floor.cpp")],
            extra_cflags=["-O3", "-fopenmp", "-Wall"],
            extra_ldflags=["-fopenmp"],
            build_directory=str(build),
        )
    except (RuntimeError, OSError, ImportError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"benchmarks/floor/floor.cpp could not be built: {lines[0]}"


def reason(error: BaseException, limit: int = 160) -> str:
    """The first line of an error, short enough for a caption."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
