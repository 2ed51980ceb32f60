"""Running Python with the torch_bn of another folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def python(
    code: str, folder: Path, interpreter: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run code that finds torch_bn in a folder, and no part of it where an editable install is."""
    code = f"""import sys
sys.path.insert(0, {str(folder)!r})
sys.meta_path[:] = [finder for finder in sys.meta_path if "Editable" not in repr(finder)]
{code}"""
    return subprocess.run([interpreter, "-c", code], text=True, capture_output=True)
