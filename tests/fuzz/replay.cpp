// replay COUNT PATH...: runs a fuzz target, without a fuzzer, on files, on all files of folders, and on so many
// inputs of random bytes, the same each time.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "bytes.h"

namespace fs = std::filesystem;

namespace {

int files = 0;

void replay(const fs::path& path) {
  if (fs::is_directory(path)) {
    for (const auto& entry : fs::directory_iterator(path)) replay(entry.path());
    return;
  }
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::fprintf(stderr, "%s\n", path.filename().c_str());  // the last one is the one that failed
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  ++files;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) replay(argv[i]);
  const int count = argc > 1 ? std::stoi(argv[1]) : 0;
  for (int seed = 0; seed < count; ++seed) {
    std::mt19937 generator(static_cast<unsigned>(seed));
    std::vector<std::uint8_t> bytes(64);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(generator());
    std::fprintf(stderr, "random %d\n", seed);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%d files and %d random inputs hold\n", files, count);
  return files > 0 ? 0 : 1;
}
