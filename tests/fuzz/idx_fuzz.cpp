// Any bytes as an IDX file: either refused with an IdxError, or read as exactly what the header announces.
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "bytes.h"
#include "idx.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using torch_bn::fuzz::require;
  const int file = memfd_create("idx", 0);
  require(file >= 0, "a file in memory");
  require(size == 0 || write(file, data, size) == static_cast<ssize_t>(size), "its bytes are written");
  try {
    const Idx idx = read_idx("/proc/self/fd/" + std::to_string(file));
    std::size_t announced = 1;
    for (const std::size_t dimension : idx.shape) announced *= dimension;
    require(!idx.shape.empty() && idx.shape.size() <= 3, "one to three dimensions");
    require(idx.values.size() == announced, "as many values as announced");
    // A plain file is its header and its values.
    const std::size_t header = 4 + 4 * idx.shape.size();
    if (size > 1 && data[0] == 0) require(size == header + announced, "nothing beside header and values");
  } catch (const IdxError& error) {
    require(std::string(error.what()).find("/proc/self/fd/") == 0, "the error names the file");
  }
  close(file);
  return 0;
}
