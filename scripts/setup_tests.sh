#!/usr/bin/env bash
# Finds GoogleTest and zlib, or installs Debian's where that is possible, and builds the C++ tests;
# setup_tests.sh gtest only finds.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
build=${BUILD:-build/dev}
export PATH="$venv/bin:$PATH"

has_gtest() {
  grep -q '^GTest_DIR:PATH=/' "$build/CMakeCache.txt" 2> /dev/null && return 0
  local probe result=0
  probe=$(mktemp -d)
  printf 'cmake_minimum_required(VERSION 3.25)\nproject(probe CXX)\nfind_package(GTest REQUIRED)\n' \
    > "$probe/CMakeLists.txt"
  cmake -S "$probe" -B "$probe/build" > /dev/null 2>&1 || result=1
  rm -rf "$probe"
  return $result
}

has_zlib() {
  echo '#include <zlib.h>' | "${CXX:-c++}" -x c++ -E - > /dev/null 2>&1
}

packages=()
has_gtest || packages+=(libgtest-dev)
has_zlib || packages+=(zlib1g-dev)  # of the C++ example, whose tests skip without it
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "torch_bn: installing ${packages[*]}"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "${packages[@]}"; } > /dev/null || true
fi
if ! has_gtest; then
  echo "torch_bn: GoogleTest was not found; install it (Debian: apt-get install libgtest-dev)." >&2
  exit 1
fi

[ "${1:-}" != gtest ] || exit 0
cmake -S . -B "$build" -DTORCH_BN_TESTS=ON -DTORCH_BN_STATIC=ON > "$build/configure.log" || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --parallel "$(nproc)"
