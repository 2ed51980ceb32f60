// From tensors to the kernels' raw pointers, on CPU.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "checks.h"
#include "kernel_args.h"
#include "memory.h"

namespace torch_bn::ops {
OutputAndStats batch_norm_forward_at_once(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                          const std::optional<at::Tensor>& bias,
                                          const std::optional<at::Tensor>& running_mean,
                                          const std::optional<at::Tensor>& running_var,
                                          const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                          std::optional<double> momentum, double eps, int64_t relu) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, relu);
  const auto& table = active_kernels();
  at::Tensor output = empty_result(input.sizes(), input.scalar_type());
  ForwardCall call(input, weight, bias, running_mean, running_var, training, eps, relu);
  auto& args = call.args;
  at::Tensor stats = empty_result({2, args.shape.c}, at::kDouble);
  args.output = output.mutable_data_ptr();
  args.mean = stats.mutable_data_ptr<double>();
  args.invstd = args.mean + args.shape.c;

  if (training) args.momentum = count_batch(num_batches_tracked, momentum);
  if (input.numel() > 0) {
    table.forward(args);
  } else {
    stats.zero_();
  }
  return {std::move(output), std::move(stats)};
}

Gradients batch_norm_backward_at_once(at::Tensor grad_input, const at::Tensor& grad_output,
                                      const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                      const at::Tensor& stats, bool training, OutputMask output_mask,
                                      const std::optional<at::Tensor>& bias, int64_t relu) {
  check_backward(grad_output, input, weight, stats, bias, relu);
  const auto& table = active_kernels();
  if (output_mask[0] && !grad_input.defined()) grad_input = empty_result(input.sizes(), input.scalar_type());
  BackwardCall call(grad_output, input, weight, bias, stats, training, relu);
  auto& args = call.args;
  at::Tensor grad_weight;
  at::Tensor grad_bias;
  if (output_mask[1]) grad_weight = empty_result({args.shape.c}, call.param_dtype);
  if (output_mask[2]) grad_bias = empty_result({args.shape.c}, call.param_dtype);
  if (input.numel() == 0) {
    if (grad_weight.defined()) grad_weight.zero_();
    if (grad_bias.defined()) grad_bias.zero_();
    return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
  }
  args.grad_input = output_mask[0] ? grad_input.mutable_data_ptr() : nullptr;
  args.grad_weight = output_mask[1] ? grad_weight.mutable_data_ptr() : nullptr;
  args.grad_bias = output_mask[2] ? grad_bias.mutable_data_ptr() : nullptr;
  table.backward(args);
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

namespace {

Gradients backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                       const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool training,
                       double /*eps*/, OutputMask output_mask, const std::optional<at::Tensor>& bias,
                       int64_t relu) {
  return batch_norm_backward_at_once({}, grad_output, input, weight, stats, training, output_mask, bias, relu);
}

TORCH_LIBRARY_IMPL(torch_bn, CPU, m) {
  m.impl("_batch_norm_forward", batch_norm_forward_at_once);
  m.impl("batch_norm_backward", backward_cpu);
}

}  // namespace
}  // namespace torch_bn::ops
