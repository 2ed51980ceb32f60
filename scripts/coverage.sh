#!/usr/bin/env bash
# Measures what the tests reach of the C++ and the Python: coverage.sh [build] [cpp] [python] [report], all four when
# none is named. ARGS goes to pytest: coverage.sh python report with ARGS adds a choice of tests to what was measured
# since the last build.
#
# Everything happens in a copy of the tree, so that the installed library stays the one that is not instrumented.
# Lost are the counts of processes that are killed. Kernels of an instruction set that this processor lacks share
# their lines with those that it has.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
python=$venv/bin/python
root=$PWD/build/coverage
copy=$root/source
build=$copy/build/dev
html=$root/html
export PATH="$venv/bin:$PATH"

fail() {
  echo "torch_bn: $1" >&2
  exit 1
}

${CXX:-c++} --version | grep -q 'Free Software Foundation' && command -v "${GCOV:-gcov}" > /dev/null ||
  fail "coverage needs GCC and its gcov; name them with CXX= and GCOV=."
if ! "$python" -c 'import coverage, gcovr' 2> /dev/null; then
  echo "torch_bn: installing what measures coverage"
  "$python" scripts/extras.py coverage | xargs "$python" -m pip install --quiet --disable-pip-version-check
fi
# Programs that tests link with the instrumented archive need its runtime.
export LDFLAGS="--coverage ${LDFLAGS:-}"

# Of files with the times that they had, nothing is compiled that has not changed.
run_build() {
  mkdir -p "$copy"
  find "$copy" -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
  git ls-files -z --cached --others --exclude-standard | tar -c --null -T - | tar -x -C "$copy"
  find "$build" -name '*.gcda' -delete 2> /dev/null || true
  local prefixes
  prefixes=$("$python" -c 'import pybind11, torch; print(torch.utils.cmake_prefix_path, pybind11.get_cmake_dir(), sep=";")')
  mkdir -p "$build"
  # Several threads count at once, and optimised loops would be told from each other no longer.
  cmake -S "$copy" -B "$build" -G Ninja -DTORCH_BN_PYTHON=ON -DTORCH_BN_TESTS=ON -DTORCH_BN_STATIC=ON \
    -DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS="-O1 -DNDEBUG --coverage -fprofile-update=atomic" \
    -DTORCH_BN_KERNEL_OPTIMISATION=-O1 -DCMAKE_PREFIX_PATH="$prefixes" -DPython_EXECUTABLE="$python" \
    > "$build/configure.log" 2>&1 || { cat "$build/configure.log"; exit 1; }
  cmake --build "$build" --parallel "$(nproc)"
  for part in library python; do
    cmake --install "$build" --prefix "$copy/torch_bn" --component "$part" > /dev/null
  done
}

run_cpp() {
  ctest --test-dir "$build" --output-on-failure
}

run_python() {
  # ARGS is a list of words.
  (cd "$copy" && PYTHONPATH=$copy "$python" -m coverage run -m pytest -q ${ARGS:-})
}

run_report() {
  rm -rf "$html"
  mkdir -p "$html/cpp"
  echo "torch_bn: C++, $html/cpp/index.html"
  # A closing brace alone is what cleans up after an exception.
  "$python" -m gcovr --root "$copy" --filter "$copy/csrc/" --object-directory "$build" --exclude-throw-branches \
    --exclude-lines-by-pattern '\s*\}\s*' \
    --merge-lines --merge-mode-functions=separate -j "$(nproc)" \
    --html-details "$html/cpp/index.html" --txt - --txt-summary "$build"/CMakeFiles/{torch_bn_*,_C}.dir "$build/tests"
  echo "torch_bn: Python, $html/python/index.html"
  cd "$copy"
  "$python" -m coverage combine --append --quiet 2> /dev/null || true  # nothing new
  "$python" -m coverage html --quiet --directory "$html/python"
  "$python" -m coverage report
}

[ $# -gt 0 ] || set -- build cpp python report
for part in "$@"; do
  declare -F "run_$part" > /dev/null || { echo "torch_bn: there is no part '$part'; the first lines of $0 name them." >&2; exit 2; }
done
for part in "$@"; do
  run_"$part"
done
