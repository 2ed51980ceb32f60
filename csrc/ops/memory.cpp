#include "memory.h"

#include <ATen/EmptyTensor.h>

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torch_bn::ops {
namespace {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
// Below this the C library's allocator mostly hands out memory that has been touched before; from here on it never
// does.
constexpr std::size_t kLarge = std::size_t{32} << 20;

// Advice that the system may not take; then nothing has changed.
void advise_huge_pages(void* data, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (bytes >= kLarge && begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void advise_huge_pages(void* /*data*/, std::size_t /*bytes*/) {}
#endif

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor result(at::detail::empty_cpu(sizes, dtype));
  advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

}  // namespace torch_bn::ops
