#!/usr/bin/env bash
# Fuzzes the kernels' interface and the C++ example's IDX reader under the address and undefined-behaviour
# sanitizers: fuzz.sh [SECONDS], for so long each, from the corpus in tests/fuzz. An input that fails is kept in
# build/fuzz/found; once mended, it belongs into the corpus, which the tests replay.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$(realpath -ms "${VENV:-.venv}")
build=${FUZZ_BUILD:-build/fuzz}
seconds=${1:-60}
export PATH="$venv/bin:$PATH"

has_clang() {
  command -v clang++ > /dev/null && printf '#include <omp.h>\n#include <zlib.h>\n' | clang++ -fopenmp -x c++ -E - > /dev/null 2>&1 &&
    echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer -x c++ -o /dev/null - 2> /dev/null
}
packages='clang libomp-dev zlib1g-dev libgtest-dev'
if ! has_clang && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  echo "torch_bn: installing $packages"
  # shellcheck disable=SC2086 -- a list of words
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y $packages; } > /dev/null || true
fi
if ! has_clang; then
  echo "torch_bn: fuzzing skipped, as this machine lacks libFuzzer (Debian: apt-get install $packages)"
  [ -z "${CI:-}" ]  # in a CI that is a failure
  exit
fi

mkdir -p "$build/found"
cmake -S . -B "$build" -DTORCH_BN_KERNELS_ONLY=ON -DTORCH_BN_TESTS=ON -DTORCH_BN_FUZZ=ON -DCMAKE_BUILD_TYPE=None \
  -DCMAKE_CXX_COMPILER=clang++ \
  -DCMAKE_CXX_FLAGS='-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -g1 -O1' \
  > "$build/configure.log" 2>&1 || { cat "$build/configure.log"; exit 1; }
cmake --build "$build" --parallel "$(nproc)" --target kernels_fuzz idx_fuzz
for target in kernels idx; do
  mkdir -p "$build/corpus/$target"
  echo "torch_bn: fuzzing $target for $seconds s"
  # All lengths from the start: short inputs leave the choices at their end at zero. What it finds worth keeping
  # goes into the first folder, which is not the repository's.
  "$build/tests/fuzz/${target}_fuzz" -seed=1 -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 \
    -max_len=1024 -len_control=0 -print_final_stats=1 -verbosity=0 -print_funcs=0 -artifact_prefix="$build/found/$target-" \
    "$build/corpus/$target" "tests/fuzz/corpus/$target"
done
