// Plain calls: of CPU tensors without a mode, transform, tracer or subclass that would miss an operator which is
// not called. They skip the dispatcher, whose every round costs a small layer more than its arithmetic.
#pragma once

#include "ops.h"

namespace torch_bn::ops {

bool is_plain(const at::Tensor& tensor);
bool is_plain(const std::optional<at::Tensor>& tensor);

// Whether nothing on this thread asks to see the operators; autograd is the caller's to think of.
bool nobody_looks_on();

// Whether autograd takes part at all: not inside an operator that has left it behind, nor in inference mode.
bool autograd_is_active();

// Whether grad_input may take the place of grad_output in a Function's backward.
bool may_overwrite(const at::Tensor& grad, const at::Tensor& input);

}  // namespace torch_bn::ops
