#!/usr/bin/env bash
# Cross-compiles the torch-free kernels for arm64, runs their tests under user-mode emulation, and compares
# every result with this machine's, bit by bit.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
build=${BUILD:-build/dev}
export PATH="$venv/bin:$PATH"

missing() {
  ! command -v aarch64-linux-gnu-g++ > /dev/null ||
    ! { command -v qemu-aarch64 || command -v qemu-aarch64-static; } > /dev/null || [ ! -d /usr/src/googletest ]
}
packages='g++-aarch64-linux-gnu qemu-user libgtest-dev'
if missing && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "torch_bn: installing $packages"
  # shellcheck disable=SC2086 -- a list of words
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $packages; } > /dev/null || true
fi
if missing; then
  echo "torch_bn: the arm64 compiler, emulator or GoogleTest's source was not found; install $packages." >&2
  exit 1
fi

mkdir -p build/arm64
cmake -S . -B build/arm64 --toolchain "$PWD/cmake/arm64-toolchain.cmake" -DTORCH_BN_KERNELS_ONLY=ON \
  -DTORCH_BN_TESTS=ON -DTORCH_BN_GTEST_SOURCE=/usr/src/googletest > build/arm64/configure.log ||
  { cat build/arm64/configure.log; exit 1; }
cmake --build build/arm64 --parallel "$(nproc)" --target kernels_test digest
ctest --test-dir build/arm64 --output-on-failure -R '^kernels_test$'

emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static)
"$build/tests/cpp/digest" > build/arm64/digest.host
"$emulator" -L /usr/aarch64-linux-gnu build/arm64/tests/cpp/digest > build/arm64/digest.arm64
diff build/arm64/digest.host build/arm64/digest.arm64 ||
  { echo "torch_bn: arm64 and this machine differ in the results above." >&2; exit 1; }
echo "torch_bn: arm64 gives the same bits as $(uname -m) in $(wc -l < build/arm64/digest.arm64) cases."
