"""Prints the requirements of the named extras of pyproject.toml, a line each."""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
print("\n".join(name for extra in sys.argv[1:] for name in extras[extra]))
