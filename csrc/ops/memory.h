// Fresh memory for results.
#pragma once

#include <ATen/core/Tensor.h>

namespace torch_bn::ops {

// An uninitialised contiguous tensor, of at::empty's CPU kernel: below autograd the dispatcher has nothing to add
// but its time, which a small layer feels. Where a tensor of the same size has just been freed, its place is
// taken, whose lines are in a cache: ask for it before any working memory, which could be cut out of it. A large
// result is asked for in huge pages: its first touch costs one page fault for 2 MiB and not 512, which together
// take longer than the arithmetic.
at::Tensor empty_result(at::IntArrayRef sizes, at::ScalarType dtype);

}  // namespace torch_bn::ops
