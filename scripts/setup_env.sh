#!/usr/bin/env bash
# Sets up what the two commands need, in the project's own virtual environment, and builds the library there.
# Run again, it does only what has changed since.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=$(realpath -ms "${VENV:-.venv}")
build=${BUILD:-build/dev}
torch_requirement=${TORCH:-torch==2.13.0}

fail() {
  echo "torch_bn: $1" >&2
  exit 1
}

command -v "$python" > /dev/null ||
  fail "Python was not found; install Python 3.10 or newer (Debian: apt-get install python3 python3-venv)."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$("$python" --version) is too old; install Python 3.10 or newer, or name one with PYTHON=."
"$python" -c 'import venv, ensurepip' 2> /dev/null ||
  fail "Python's venv module was not found; install it (Debian: apt-get install python3-venv)."
cxx=${CXX:-c++}
command -v "$cxx" > /dev/null ||
  fail "a C++20 compiler was not found; install one (Debian: apt-get install g++), or name it with CXX=."
probe=$(mktemp -d)
trap 'rm -rf "$probe"' EXIT
echo '#include <omp.h>
#include <concepts>
int main() { return omp_get_max_threads() < 1; }' > "$probe/probe.cpp"
"$cxx" -std=c++20 -fopenmp "$probe/probe.cpp" -o "$probe/probe" 2> /dev/null ||
  fail "$cxx cannot build C++20 with OpenMP; install GCC 11 or newer (Debian: apt-get install g++)."
include_dir=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -e "$include_dir/Python.h" ] ||
  fail "Python's headers were not found in $include_dir; install them (Debian: apt-get install python3-dev)."

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

# `stale STAMP FILE...`: whether STAMP is missing or older than one of the files.
stale() {
  local stamp=$1
  shift
  [ -e "$stamp" ] || return 0
  [ -n "$(find "$@" -newer "$stamp" -print -quit)" ]
}

# torch is pinned: a range would pick up a build for another device, of several GB. Everything else follows it.
if stale "$venv/.requirements" pyproject.toml scripts/setup_env.sh; then
  echo "torch_bn: installing requirements into ${VENV:-.venv}"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$torch_requirement" \
    'setuptools>=77' wheel 'cmake>=3.25' ninja 'pybind11>=2.12'
  # The optional dependencies by name, because an editable install of the project itself would build it.
  "$venv/bin/python" scripts/extras.py bench examples test lint > "$probe/extras.txt"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$probe/extras.txt"
  touch "$venv/.requirements"
fi

built() {
  [ -e torch_bn/_build_config.py ] && [ -e "$build/CMakeCache.txt" ]
}
if ! built || stale "$venv/.installed" csrc cmake CMakeLists.txt setup.py pyproject.toml "$venv/.requirements"; then
  echo "torch_bn: building the library"
  PATH="$venv/bin:$PATH" TORCH_BN_BUILD_DIR="$build" "$venv/bin/python" -m pip install --quiet \
    --disable-pip-version-check --no-build-isolation --no-deps --editable .
  touch "$venv/.installed"
fi
