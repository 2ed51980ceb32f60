#!/usr/bin/env bash
# Makes the documentation site in build/docs. A warning is an error.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
if ! "$python" -c 'import furo, myst_parser, sphinx' 2> /dev/null; then
  echo "torch_bn: installing the documentation's requirements"
  "$python" scripts/extras.py docs | xargs "$python" -m pip install --quiet --disable-pip-version-check
fi
"$python" -m sphinx -q -W --keep-going -b html docs build/docs
echo "torch_bn: the site begins at build/docs/index.html"
