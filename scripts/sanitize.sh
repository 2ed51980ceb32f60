#!/usr/bin/env bash
# Runs the torch-free kernels and their tests under sanitizers: sanitize.sh [address] [threads] [valgrind], all three
# when none is named. What this machine lacks is installed as root on Debian, and skipped in words elsewhere; in a
# CI, where the variable CI is set, that is a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
root=${SANITIZE_BUILD:-build/sanitize}
export PATH="$venv/bin:$PATH"

lacking=77  # what automake's tests end with when they are skipped

# `needs COMMAND PACKAGE...`: whether the command is there, perhaps after installing the packages.
needs() {
  local command=$1
  shift
  if ! eval "$command" > /dev/null 2>&1 && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "torch_bn: installing $*"
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y "$@"; } > /dev/null || true
  fi
  eval "$command" > /dev/null 2>&1 && return 0
  echo "torch_bn: this machine lacks $* (Debian: apt-get install $*)"
  return 1
}

# `build NAME COMPILER FLAGS TARGET...`
build() {
  local tree=$root/$1 compiler=$2 flags=$3
  shift 3
  mkdir -p "$tree"
  cmake -S . -B "$tree" -DTORCH_BN_KERNELS_ONLY=ON -DTORCH_BN_TESTS=ON -DCMAKE_BUILD_TYPE=None \
    -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_CXX_FLAGS="$flags" > "$tree/configure.log" 2>&1 ||
    { cat "$tree/configure.log"; exit 1; }
  cmake --build "$tree" --parallel "$(nproc)" --target "$@"
}

clang_with_openmp='command -v clang++ && echo "#include <omp.h>" | clang++ -fopenmp -x c++ -E -'

# Clang takes a fraction of GCC's time for instrumented kernels.
run_address() {
  local compiler=${CXX:-c++}
  if needs "$clang_with_openmp" clang libomp-dev; then compiler=clang++; fi
  # The guard pages are taken back by their size.
  build address "$compiler" \
    '-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -fsized-deallocation -g1 -O1' \
    kernels_test relu_test sync_kernels_test guard_test
  export ASAN_OPTIONS=detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
  export LSAN_OPTIONS=suppressions=scripts/lsan.supp:print_suppressions=0
  for name in kernels_test relu_test sync_kernels_test guard_test; do
    "$root/address/tests/cpp/$name" --gtest_brief=1
  done
}

# The thread sanitizer sees no synchronisation inside GCC's OpenMP. LLVM's tells it, through libarcher.
run_threads() {
  needs "$clang_with_openmp && ls /usr/lib/llvm-*/lib/libarcher.so" clang libomp-dev || return "$lacking"
  build threads clang++ '-fsanitize=thread -g1 -O1' kernels_test sync_kernels_test
  for name in kernels_test sync_kernels_test; do
    TSAN_OPTIONS="ignore_noninstrumented_modules=1 halt_on_error=1" OMP_NUM_THREADS=4 \
      "$root/threads/tests/cpp/$name" --gtest_brief=1
  done
}

# Slow, and without AVX-512: a few tests on small arrays.
run_valgrind() {
  needs 'command -v valgrind' valgrind || return "$lacking"
  build plain "${CXX:-c++}" '-g1 -O1' kernels_test
  valgrind --quiet --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite \
    "$root/plain/tests/cpp/kernels_test" --gtest_brief=1 \
    --gtest_filter='*AskedForGradients*:*BadChannel*:*Outlier*:*Cancelling*:*ExactData*:Dispatch.*'
}

[ $# -gt 0 ] || set -- address threads valgrind
clean=()
for part in "$@"; do
  declare -F "run_$part" > /dev/null || { echo "torch_bn: there is no part '$part'; the first lines of $0 name them." >&2; exit 2; }
done
for part in "$@"; do
  echo "torch_bn: $part"
  # Not under `||`, where bash would go on after a failure.
  set +e
  (set -e; "run_$part")
  status=$?
  set -e
  case $status in
    0) clean+=("$part") ;;
    "$lacking") echo "torch_bn: $part skipped"; [ -z "${CI:-}" ] || exit 1 ;;
    *) exit "$status" ;;
  esac
done
echo "torch_bn: clean under ${clean[*]:-nothing, as all was skipped}"
