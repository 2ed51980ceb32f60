// Fresh memory for large results.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_bn::ops {

// An uninitialised contiguous tensor. A large one is asked for in huge pages: its first touch costs one page
// fault for 2 MiB and not 512, which together take longer than the arithmetic.
at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);

}  // namespace torch_bn::ops
