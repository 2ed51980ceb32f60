// Shapes and types without data, for tracing; sizes may be symbolic.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"

namespace torch_bn::ops {
namespace {

OutputAndStats forward_meta(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, bool training,
                            std::optional<double> /*momentum*/, double eps, int64_t relu) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, relu);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty_symint({2, input.sym_size(1)}, input.options().dtype(at::kDouble))};
}

Gradients backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                        const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool /*training*/,
                        double /*eps*/, OutputMask output_mask, const std::optional<at::Tensor>& bias,
                        int64_t relu) {
  check_backward(grad_output, input, weight, stats, bias, relu);
  const auto param_dtype = parameter_dtype(input, bias, weight);
  auto per_channel = [&](bool wanted) {
    return wanted ? at::empty_symint({input.sym_size(1)}, input.options().dtype(param_dtype)) : at::Tensor();
  };
  return {output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : at::Tensor(),
          per_channel(output_mask[1]), per_channel(output_mask[2])};
}

TORCH_LIBRARY_IMPL(torch_bn, Meta, m) {
  m.impl("_batch_norm_forward", forward_meta);
  m.impl("batch_norm_backward", backward_meta);
}

}  // namespace
}  // namespace torch_bn::ops
