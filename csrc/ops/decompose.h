// Batch norm and its derivatives in differentiable ATen operators: the way of torch.func, of forward-mode AD
// and of every derivative beyond the first. Works with symbolic sizes.
#pragma once

#include "ops.h"

namespace torch_bn::ops::decompose {

// The same contract as the operator: running statistics and the counter are updated in place.
OutputAndStats forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                       const std::optional<at::Tensor>& running_var,
                       const std::optional<at::Tensor>& num_batches_tracked, bool training,
                       std::optional<double> momentum, double eps, int64_t relu);

// The update of the running statistics that `forward` makes.
void update_running_stats(const at::Tensor& mean, const at::Tensor& var, c10::SymInt count,
                          const std::optional<at::Tensor>& running_mean,
                          const std::optional<at::Tensor>& running_var,
                          const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum);

// First derivatives. In training the statistics are computed anew from the input, so that the result can be
// differentiated with respect to it; in evaluation `stats` are constants.
Gradients backward(const at::Tensor& grad_output, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                   const at::Tensor& stats, bool training, double eps, OutputMask output_mask,
                   const std::optional<at::Tensor>& bias, int64_t relu);

// Gradients of the backward with respect to its grad_output, input and weight, given the gradients of its
// three results (each may be undefined).
struct BackwardGradients {
  at::Tensor grad_output;
  at::Tensor input;
  at::Tensor weight;
};
BackwardGradients double_backward(const Gradients& grads, const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& weight, const at::Tensor& stats, bool training, double eps,
                                  const at::Tensor& bias, int64_t relu);

}  // namespace torch_bn::ops::decompose
