#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "huge_pages.h"

namespace torch_bn::ops {
namespace {

// Memory as the C library gave it, and the first address in it at which torch would let a tensor begin.
struct Place {
  void* memory = nullptr;
  std::byte* data = nullptr;
};

#ifdef __GLIBC__
// Smaller results lie in a cache wherever they are.
constexpr std::size_t kRecycledFrom = std::size_t{64} << 10;

Place place_in(void* memory, std::size_t bytes) {
  const std::size_t alignment = c10::c10_compute_alignment(bytes);
  const auto address = reinterpret_cast<std::uintptr_t>(memory);
  return {memory, static_cast<std::byte*>(memory) + (alignment - address % alignment) % alignment};
}

// Memory for `bytes` where the C library has just freed a tensor of that size, or none. torch asks for an aligned
// address, and the library then looks for 96 bytes more, to move the beginning: the place of a tensor never fits.
// Asked for the bytes alone it gives the one that was freed last. That is often what the layer before has read
// (the input of a ReLU in a Sequential), still in a cache. The bytes cut off before that tensor may have been
// joined to it when it was freed: then the place begins too early, and fits a request with those bytes.
Place recycled(std::size_t bytes) {
  if (bytes < kRecycledFrom || bytes >= kMappedFrom) return {};
  if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return {};
  std::size_t before = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const Place place = place_in(std::malloc(before + bytes), bytes);
    const std::size_t cut = static_cast<std::size_t>(place.data - static_cast<std::byte*>(place.memory));
    if (cut <= before) return place;
    std::free(place.memory);
    before = cut;
  }
  return {};
}
#else
Place recycled(std::size_t /*bytes*/) {
  return {};
}
#endif

// What at::empty makes, of memory as its allocator gives it.
at::Tensor tensor_in(const Place& place, std::size_t bytes, at::IntArrayRef sizes, at::ScalarType dtype) {
  auto* allocator = c10::GetDefaultCPUAllocator();
  c10::profiledCPUMemoryReporter().New(place.memory, bytes);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), bytes,
          at::DataPtr(place.data, place.memory, allocator->raw_deleter(), at::kCPU), allocator,
          /*resizable=*/true),
      c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype) {
  const std::size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(dtype));
  if (const Place place = recycled(bytes); place.data != nullptr) return tensor_in(place, bytes, sizes, dtype);
  at::Tensor result(at::detail::empty_cpu(sizes, dtype));
  advise_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace torch_bn::ops
