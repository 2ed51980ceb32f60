// Reader of IDX files of unsigned bytes, the format of MNIST, plain or compressed with gzip.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

struct Idx {
  std::vector<std::size_t> shape;  // one to three dimensions
  std::vector<std::uint8_t> values;
};

// A file that cannot be read as IDX; its one line names the file and what is wrong.
struct IdxError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Throws IdxError for anything but a complete, exact file: wrong magic number, a body longer or shorter than
// announced, more than 2^28 bytes, a damaged gzip stream, an unreadable file.
Idx read_idx(const std::string& path);
