#include "memory.h"

#include <ATen/EmptyTensor.h>

#include "huge_pages.h"

namespace torch_bn::ops {

at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor result(at::detail::empty_cpu(sizes, dtype));
  advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  return result;
}

}  // namespace torch_bn::ops
