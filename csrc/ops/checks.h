// What is refused, with the exception types and the words of torch's own batch norm. Every check runs before
// anything is written, and none looks at an element, so meta and symbolic tensors pass through the same ones.
#pragma once

#include "ops.h"

namespace torch_bn::ops {

// That it is the number of a Relu.
void check_relu(int64_t relu);

void check_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                   const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                   const std::optional<at::Tensor>& running_var,
                   const std::optional<at::Tensor>& num_batches_tracked, bool training, double eps, int64_t relu);

// The same for some rows of a batch, of which there may be one or none.
void check_forward_but_rows(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, bool training, double eps);

void check_backward(const at::Tensor& grad_output, const at::Tensor& input,
                    const std::optional<at::Tensor>& weight, const at::Tensor& stats,
                    const std::optional<at::Tensor>& bias, int64_t relu);

// Running statistics are constants to autograd.
void check_statistics_need_no_grad(const std::optional<at::Tensor>& running_mean,
                                   const std::optional<at::Tensor>& running_var);

}  // namespace torch_bn::ops
