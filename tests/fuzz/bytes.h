// Choices read off the bytes that a fuzzer makes up; zeros where there are none left.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace torch_bn::fuzz {

class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  std::uint8_t next() { return at_ < size_ ? data_[at_++] : 0; }
  bool flag() { return (next() & 1) != 0; }
  // From low to high, both included.
  std::int64_t number(std::int64_t low, std::int64_t high) {
    const std::int64_t low_byte = next();
    const std::int64_t value = low_byte | std::int64_t{next()} << 8;
    return low + value % (high - low + 1);
  }
  // Fills an array with what is left, again and again, and takes none of it away.
  void fill(void* target, std::size_t bytes) {
    auto* out = static_cast<std::uint8_t*>(target);
    const std::size_t rest = size_ - at_;
    for (std::size_t i = 0; i < bytes; ++i) out[i] = rest > 0 ? data_[at_ + i % rest] : 0;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// What must hold for every input; the fuzzer keeps the input for which it does not.
void require(bool holds, const char* what);

}  // namespace torch_bn::fuzz
