// Advice to the system, which it may not take; then nothing has changed. Header only: the benchmarks' extension is
// compiled apart and gives the same.
#pragma once

#include <cstddef>
#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torch_bn::ops {

// Below this the C library's allocator mostly hands out memory that has been touched before, with which the advice
// would stay when it is given back; from here on it never does.
constexpr std::size_t kMappedFrom = std::size_t{32} << 20;

#if defined(__linux__) && defined(MADV_HUGEPAGE)
inline void advise_huge_pages(void* data, std::size_t bytes) {
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (bytes >= kMappedFrom && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
inline void advise_huge_pages(void* /*data*/, std::size_t /*bytes*/) {}
#endif

}  // namespace torch_bn::ops
