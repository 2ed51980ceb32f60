// The registered operators as C++ functions. Each call goes through the dispatcher, so that autograd,
// tracing, transforms and modes see it; but for plain calls (see plain.h) of the public ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace torch_bn::ops {

// Forward statistics travel as one tensor: float64 of shape (2, C), the mean and 1 / sqrt(var + eps).
using OutputAndStats = std::tuple<at::Tensor, at::Tensor>;
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;  // of input, weight, bias
using OutputMask = std::array<bool, 3>;

// A ReLU done in the same sweeps: none, relu(bn(x)) or bn(relu(x)); the numbers that the operators take.
enum class Relu : int64_t { none, after, before };
inline bool is(int64_t relu, Relu which) {
  return relu == static_cast<int64_t>(which);
}

// The public operators: batch_norm, batch_norm_relu or relu_batch_norm.
at::Tensor batch_norm(Relu relu, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps);

OutputAndStats batch_norm_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, int64_t relu);

// Evaluation in an operator of its own, whose schema promises that it writes nothing: what compiles or freezes a
// model in evaluation need not keep the running statistics as state.
OutputAndStats batch_norm_inference(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                    const at::Tensor& running_var, double eps, int64_t relu);

// Whichever of the two fits; with `batch_norm_forward` for arguments that fit neither, since it refuses them.
OutputAndStats batch_norm_in_mode(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, int64_t relu);

// The bias is read only where a ReLU comes after, whose mask is computed again from the input.
Gradients batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                              const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool training,
                              double eps, OutputMask output_mask, const std::optional<at::Tensor>& bias,
                              int64_t relu);

// The public operators without the dispatcher, autograd included, for plain calls (see plain.h); nothing for
// others.
std::optional<at::Tensor> batch_norm_if_plain(Relu relu, const at::Tensor& input,
                                              const std::optional<at::Tensor>& weight,
                                              const std::optional<at::Tensor>& bias,
                                              const std::optional<at::Tensor>& running_mean,
                                              const std::optional<at::Tensor>& running_var,
                                              const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                              std::optional<double> momentum, double eps);

// Forward and backward on CPU alone and not through the dispatcher. grad_input may be undefined, or grad_output
// where that is contiguous and nobody else will read it.
OutputAndStats batch_norm_forward_at_once(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                          const std::optional<at::Tensor>& bias,
                                          const std::optional<at::Tensor>& running_mean,
                                          const std::optional<at::Tensor>& running_var,
                                          const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                          std::optional<double> momentum, double eps, int64_t relu);
Gradients batch_norm_backward_at_once(at::Tensor grad_input, const at::Tensor& grad_output,
                                      const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                      const at::Tensor& stats, bool training, OutputMask output_mask,
                                      const std::optional<at::Tensor>& bias, int64_t relu);

// Moves running statistics by what a batch of `count` values per channel had: float64 mean and biased variance,
// both (C). Apart from the forward only where that one is decomposed.
void update_running_stats(const at::Tensor& mean, const at::Tensor& var, c10::SymInt count,
                          const std::optional<at::Tensor>& running_mean,
                          const std::optional<at::Tensor>& running_var,
                          const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum);

// The tensor of an optional argument; undefined when there is none.
inline at::Tensor tensor_or_undefined(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? *tensor : at::Tensor();
}

inline std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline bool is_given(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined();
}

// The type of whichever parameter or statistic is given. Where none is, per-channel results of a 16-bit input
// are in float32: autograd rounds them once more if the parameter they belong to is in 16 bits.
template <typename... Optionals>
at::ScalarType parameter_dtype(const at::Tensor& input, const Optionals&... parameters) {
  const auto own = input.scalar_type();
  auto dtype = at::isReducedFloatingType(own) ? at::kFloat : own;
  ((is_given(parameters) ? void(dtype = parameters->scalar_type()) : void()), ...);
  return dtype;
}

}  // namespace torch_bn::ops
