#include "serve.h"

#include <torch/nn/functional/batchnorm.h>

namespace torch_bn::nn {
double factor_of(std::optional<double> momentum, const at::Tensor& num_batches_tracked) {
  if (momentum) return *momentum;
  return num_batches_tracked.defined() ? 1.0 / (num_batches_tracked.item<double>() + 1.0) : 0.0;
}

bool is_counted_apart(const at::Tensor& num_batches_tracked) {
  return num_batches_tracked.defined() && num_batches_tracked.scalar_type() != at::kLong;
}

namespace {

// What the forward of torch's layer does, but for one thing: the counter is last to change.
at::Tensor by_torch(ops::Relu relu, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                    const at::Tensor& running_mean, const at::Tensor& running_var,
                    const at::Tensor& num_batches_tracked, bool training, std::optional<double> momentum,
                    double eps) {
  const double factor = factor_of(momentum, num_batches_tracked);
  const auto options = torch::nn::functional::BatchNormFuncOptions()
                           .weight(weight)
                           .bias(bias)
                           .training(training)
                           .momentum(factor)
                           .eps(eps);
  auto output = torch::nn::functional::batch_norm(relu == ops::Relu::before ? torch::relu(input) : input,
                                                  running_mean, running_var, options);
  if (num_batches_tracked.defined()) num_batches_tracked.add_(1);
  return relu == ops::Relu::after ? torch::relu(output) : output;
}

bool is_dense(const at::Tensor& tensor) {
  return (tensor.is_cpu() || tensor.is_meta()) && tensor.layout() == at::kStrided && !tensor.is_quantized() &&
         !tensor.is_nested();
}

// Whether our operator's refusal stands; if not, torch is asked to serve, or to find the words. It stands for
// arguments of which we know that torch refuses them in the same words: an error that is no refusal, such as a
// lack of memory, is not tried twice.
bool is_final(const at::Tensor& input, std::initializer_list<const at::Tensor*> channels,
              const at::Tensor& num_batches_tracked) {
  if (input.numel() == 0 || !is_dense(input)) return false;  // torch checks no sizes of an empty input
  bool any_on_cpu = input.is_cpu();
  for (const auto* each : channels) {
    if (!each->defined()) continue;
    if (!is_dense(*each)) return false;
    any_on_cpu = any_on_cpu || each->is_cpu();
  }
  const bool counter_is_usual =
      !num_batches_tracked.defined() || (is_dense(num_batches_tracked) && num_batches_tracked.dim() == 0);
  return any_on_cpu && counter_is_usual;
}

}  // namespace

at::Tensor batch_norm(ops::Relu relu, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                      const at::Tensor& running_mean, const at::Tensor& running_var,
                      const at::Tensor& num_batches_tracked, bool training, std::optional<double> momentum,
                      double eps) {
  const auto rank = input.dim();
  if (rank == 2 || rank == 3) {
    try {
      const bool apart = is_counted_apart(num_batches_tracked);
      auto output = ops::batch_norm(relu, input, ops::optional_of(weight), ops::optional_of(bias),
                                    ops::optional_of(running_mean), ops::optional_of(running_var),
                                    apart ? std::nullopt : ops::optional_of(num_batches_tracked), training,
                                    apart ? factor_of(momentum, num_batches_tracked) : momentum, eps);
      if (apart) num_batches_tracked.add_(1);
      return output;
    } catch (const c10::ValueError&) {
      // One value per channel, or an eps out of range: C++ and Python of torch differ in the words, or in whether
      // they refuse at all. A refused call has changed nothing.
    } catch (const c10::Error&) {
      if (is_final(input, {&weight, &bias, &running_mean, &running_var}, num_batches_tracked)) throw;
    }
  }
  return by_torch(relu, input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
                  eps);
}

}  // namespace torch_bn::nn
