// The operators' schemas, their entry points through the dispatcher, and the public op in terms of the
// private one.
#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/batch_norm.h>
#include <ATen/ops/relu.h>
#include <ATen/record_function.h>
#include <torch/library.h>

#include <string>

#include "ops.h"

namespace torch_bn::ops {
namespace {

constexpr const char* kPublicNames[] = {"batch_norm", "batch_norm_relu",
                                        "relu_batch_norm"};  // in the order of Relu

}  // namespace

// Running statistics and the counter are declared as written to. The private forward also returns the
// statistics that backward needs; callers of the public op never see them.
TORCH_LIBRARY(torch_bn, m) {
  for (const char* name : kPublicNames)
    m.def((std::string(name) +
           "(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
           "Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps) -> Tensor")
              .c_str(),
          {at::Tag::pt2_compliant_tag});
  m.def(
      "_batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "int relu=0) -> (Tensor output, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_batch_norm_inference(Tensor input, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "float eps, int relu=0) -> (Tensor output, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, bool training, "
      "float eps, bool[3] output_mask, Tensor? bias=None, int relu=0) "
      "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_update_running_stats(Tensor mean, Tensor var, SymInt count, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum) -> ()",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor batch_norm(Relu relu, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, bool training,
                      std::optional<double> momentum, double eps) {
  // The operator would do the same, but for a profiler, which is to see it.
  if (!at::hasCallbacks())
    if (auto output = batch_norm_if_plain(relu, input, weight, bias, running_mean, running_var,
                                          num_batches_tracked, training, momentum, eps))
      return *std::move(output);
  using Public = at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&, bool, std::optional<double>, double);
  static const auto find = [](Relu which) {
    const auto name = std::string("torch_bn::") + kPublicNames[static_cast<std::size_t>(which)];
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "").typed<Public>();
  };
  static const decltype(find(relu)) ops[] = {find(Relu::none), find(Relu::after), find(Relu::before)};
  return ops[static_cast<std::size_t>(relu)].call(input, weight, bias, running_mean, running_var,
                                                  num_batches_tracked, training, momentum, eps);
}

OutputAndStats batch_norm_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, int64_t relu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::_batch_norm_forward", "")
                             .typed<decltype(batch_norm_forward)>();
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                 relu);
}

OutputAndStats batch_norm_inference(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                    const at::Tensor& running_var, double eps, int64_t relu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::_batch_norm_inference", "")
                             .typed<decltype(batch_norm_inference)>();
  return op.call(input, weight, bias, running_mean, running_var, eps, relu);
}

OutputAndStats batch_norm_in_mode(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps, int64_t relu) {
  if (!training && is_given(running_mean) && is_given(running_var))
    return batch_norm_inference(input, weight, bias, *running_mean, *running_var, eps, relu);
  return batch_norm_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                            momentum, eps, relu);
}

Gradients batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                              const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool training,
                              double eps, OutputMask output_mask, const std::optional<at::Tensor>& bias,
                              int64_t relu) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::batch_norm_backward", "")
                             .typed<decltype(batch_norm_backward)>();
  return op.call(grad_output, input, weight, stats, training, eps, output_mask, bias, relu);
}

void update_running_stats(const at::Tensor& mean, const at::Tensor& var, c10::SymInt count,
                          const std::optional<at::Tensor>& running_mean,
                          const std::optional<at::Tensor>& running_var,
                          const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::_update_running_stats", "")
                             .typed<decltype(update_running_stats)>();
  op.call(mean, var, std::move(count), running_mean, running_var, num_batches_tracked, momentum);
}

namespace {

// What another device is served by: torch's own, with the counter and the cumulative average of torch's layer.
at::Tensor batch_norm_by_torch(Relu relu, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& running_mean,
                               const std::optional<at::Tensor>& running_var,
                               const std::optional<at::Tensor>& num_batches_tracked, bool training,
                               std::optional<double> momentum, double eps) {
  double factor = momentum.value_or(0.0);
  const bool counts = training && is_given(num_batches_tracked);
  if (counts && !momentum) factor = 1.0 / (num_batches_tracked->item<double>() + 1.0);
  auto output = at::batch_norm(relu == Relu::before ? at::relu(input) : input, weight, bias, running_mean,
                               running_var, training, factor, eps, at::globalContext().userEnabledCuDNN());
  if (counts) num_batches_tracked->add_(1);
  return relu == Relu::after ? at::relu(output) : output;
}

template <Relu kRelu>
at::Tensor batch_norm_composite(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                std::optional<double> momentum, double eps) {
  if (auto output = batch_norm_if_plain(kRelu, input, weight, bias, running_mean, running_var, num_batches_tracked,
                                        training, momentum, eps))
    return *std::move(output);
  if (!input.is_cpu() && !input.is_meta())
    return batch_norm_by_torch(kRelu, input, weight, bias, running_mean, running_var, num_batches_tracked,
                               training, momentum, eps);
  return std::get<0>(batch_norm_in_mode(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                        training, momentum, eps, static_cast<int64_t>(kRelu)));
}

// The kernels serve both modes through one operator.
OutputAndStats inference_by_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                    const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                    const at::Tensor& running_var, double eps, int64_t relu) {
  return batch_norm_forward(input, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false,
                            /*momentum=*/0.0, eps, relu);
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeExplicitAutograd, m) {
  m.impl("_batch_norm_inference", inference_by_forward);
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeImplicitAutograd, m) {
  m.impl("batch_norm", batch_norm_composite<Relu::none>);
  m.impl("batch_norm_relu", batch_norm_composite<Relu::after>);
  m.impl("relu_batch_norm", batch_norm_composite<Relu::before>);
}

}  // namespace
}  // namespace torch_bn::ops
