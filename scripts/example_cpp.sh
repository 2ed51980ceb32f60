#!/usr/bin/env bash
# Builds examples/cpp_libtorch against the Python package, as a user would from outside the tree, and runs it on
# MNIST for both placements of batch norm.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
data=${DATA:-${TORCH_BN_MNIST:-}}
build=build/example-cpp
export PATH="$venv/bin:$PATH"

if [ -z "$data" ]; then
  data=$(PYTHONPATH=examples python -c 'from mlp.fetch import DEFAULT_URL, fetch_mnist; print(fetch_mnist(DEFAULT_URL, None))') || {
    echo "torch_bn: MNIST could not be fetched; name a folder that has it: make example-cpp DATA=DIR" >&2
    exit 2
  }
fi
prefix=$(python -c 'import torch_bn; print(torch_bn.cmake_prefix_path)')
torch=$(python -c 'import torch; print(torch.utils.cmake_prefix_path)')
mkdir -p "$build"
cmake -S examples/cpp_libtorch -B "$build" -DCMAKE_PREFIX_PATH="$prefix;$torch" > "$build/configure.log" ||
  { cat "$build/configure.log"; exit 2; }
cmake --build "$build" --parallel "$(nproc)"
for placement in ${PLACEMENTS:-after before}; do
  # shellcheck disable=SC2086 -- a list of words
  "$build/train_mlp" --data "$data" --placement "$placement" --checkpoint "$build/$placement.pt" ${ARGS:-}
done
