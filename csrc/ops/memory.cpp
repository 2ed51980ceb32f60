#include "memory.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdint>
#include <cstdlib>

#include "huge_pages.h"

namespace torch_bn::ops {
namespace {

#ifdef __GLIBC__
// Smaller results lie in a cache wherever they are.
constexpr std::size_t kRecycledFrom = std::size_t{64} << 10;

// Memory of exactly `bytes` if the C library has it where torch would put a tensor, or null. torch asks for an
// aligned address, and the library then looks for 96 bytes more, to move the beginning: the place of a tensor of
// the same size never fits. Asked for the bytes alone it gives the one that was freed last. That is often what the
// layer before has read (the input of a ReLU in a Sequential), still in a cache.
void* recycled(std::size_t bytes) {
  if (bytes < kRecycledFrom || bytes >= kMappedFrom) return nullptr;
  if (c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) return nullptr;
  void* data = std::malloc(bytes);
  if (reinterpret_cast<std::uintptr_t>(data) % c10::c10_compute_alignment(bytes) == 0) return data;
  std::free(data);
  return nullptr;
}
#else
void* recycled(std::size_t /*bytes*/) {
  return nullptr;
}
#endif

// What at::empty makes, of memory as its allocator gives it.
at::Tensor tensor_in(void* data, std::size_t bytes, at::IntArrayRef sizes, at::ScalarType dtype) {
  auto* allocator = c10::GetDefaultCPUAllocator();
  c10::profiledCPUMemoryReporter().New(data, bytes);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                            at::DataPtr(data, data, allocator->raw_deleter(), at::kCPU), allocator,
                                            /*resizable=*/true),
      c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(dtype));
  result.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return result;
}

}  // namespace

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype) {
  const std::size_t bytes = at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(dtype));
  if (void* data = recycled(bytes)) return tensor_in(data, bytes, sizes, dtype);
  at::Tensor result(at::detail::empty_cpu(sizes, dtype));
  advise_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace torch_bn::ops
