// The autograd functions. Forward and backward are both operators; each has an autograd kernel, so that a
// backward that is itself recorded can be differentiated again, to any order.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "checks.h"
#include "decompose.h"
#include "recording.h"

namespace torch_bn::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What takes no part in differentiation, passed beside the variables.
struct ForwardOptions {
  const std::optional<at::Tensor>& running_mean;
  const std::optional<at::Tensor>& running_var;
  const std::optional<at::Tensor>& num_batches_tracked;
  bool training;
  std::optional<double> momentum;
  double eps;
};

OutputAndStats forward_below(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const ForwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  return batch_norm_in_mode(input, weight, bias, options.running_mean, options.running_var,
                            options.num_batches_tracked, options.training, options.momentum, options.eps);
}

struct BackwardOptions {
  const at::Tensor& stats;
  bool training;
  double eps;
  OutputMask output_mask;
};

// Whether this is a plain CPU tensor in a plain call: no mode, transform or tracer would miss an operator that is
// not called.
bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return tensor.layout() == at::kStrided && (tensor.key_set() | kPlain) == kPlain;
}

bool is_plain_call() {
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return !at::GradMode::is_enabled() && !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         (tls.included_ -
          c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView}))
             .empty();
}

// Whether the gradient that the engine handed to a Function's backward is dead after it. The Function holds the
// one reference; whoever else may read the gradient (its user, a hook, `retain_grad`, another node) holds one
// more, and a view of it another of the storage. Memory that is not torch's own, such as an array of NumPy's, may
// have owners that no count tells of.
bool is_last_use(const at::Tensor& grad) {
  return grad.use_count() == 1 && grad.has_storage() && grad.storage().use_count() == 1 &&
         grad.storage().data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

// Whether grad_input may take the place of grad_output.
bool may_overwrite(const at::Tensor& grad, const at::Tensor& input) {
  return is_plain_call() && is_plain(grad) && is_plain(input) && is_last_use(grad) && grad.is_contiguous() &&
         grad.scalar_type() == input.scalar_type() && grad.sizes() == input.sizes() &&
         !grad.storage().is_alias_of(input.storage());
}

Gradients backward_below(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  return batch_norm_backward(grad_output, input, weight, options.stats, options.training, options.eps,
                             options.output_mask);
}

}  // namespace

// The names of these two structs are what users see in a result's grad_fn.

// Running statistics are never saved: a second forward before the backward may change them.
struct BatchNorm : Function<BatchNorm> {
  static constexpr bool is_traceable = true;  // compiled autograd may look into the backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const ForwardOptions& options,
                            StatsResult result) {
    auto [output, stats] = forward_below(input, weight, bias, options);
    ctx->save_for_backward({input, tensor_or_undefined(weight), stats});
    ctx->saved_data["training"] = options.training;
    ctx->saved_data["eps"] = options.eps;
    if (is_given(bias)) ctx->saved_data["bias_sizes"] = bias->sym_sizes();
    *result.stats = std::move(stats);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[1];
    const auto bias_sizes = ctx->saved_data.find("bias_sizes");
    const bool has_bias = bias_sizes != ctx->saved_data.end();
    // Edges are numbered over the arguments that were given.
    const OutputMask mask = {ctx->needs_input_grad(0), weight.defined() && ctx->needs_input_grad(1),
                             has_bias && ctx->needs_input_grad(weight.defined() ? 2 : 1)};
    const bool training = ctx->saved_data["training"].toBool();
    auto [grad_input, grad_weight, grad_bias] =
        mask[0] && may_overwrite(grads[0], saved[0])
            ? batch_norm_backward_over(grads[0], saved[0], optional_of(weight), saved[2], training, mask)
            : batch_norm_backward(grads[0], saved[0], optional_of(weight), saved[2], training,
                                  ctx->saved_data["eps"].toDouble(), mask);
    // Parameters may have any shape with C elements.
    if (mask[1] && weight.dim() != 1) grad_weight = grad_weight.reshape_symint(weight.sym_sizes());
    if (mask[2] && bias_sizes->second.toListRef().size() != 1)
      grad_bias = grad_bias.reshape_symint(bias_sizes->second.toSymIntVector());
    return {grad_input, grad_weight, grad_bias, {}, {}};
  }
};

// Returns the gradients that the mask asks for, and no others, in order.
struct BatchNormBackward : Function<BatchNormBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
    auto [grad_input, grad_weight, grad_bias] = backward_below(grad_output, input, weight, options);
    ctx->save_for_backward({grad_output, input, tensor_or_undefined(weight), options.stats});
    ctx->set_materialize_grads(false);
    ctx->saved_data["training"] = options.training;
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["mask"] =
        c10::List<bool>({options.output_mask[0], options.output_mask[1], options.output_mask[2]});
    variable_list results;
    for (const at::Tensor& gradient : {grad_input, grad_weight, grad_bias})
      if (gradient.defined()) results.push_back(gradient);
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = ctx->saved_data["mask"].toBoolList();
    std::size_t next = 0;
    auto of_result = [&](std::size_t i) { return mask[i] ? grads[next++] : at::Tensor(); };
    // In declared order: a braced list is evaluated from left to right.
    const Gradients of_results{of_result(0), of_result(1), of_result(2)};
    auto result =
        decompose::double_backward(of_results, saved[0], saved[1], saved[2], saved[3],
                                   ctx->saved_data["training"].toBool(), ctx->saved_data["eps"].toDouble());
    return {ctx->needs_input_grad(0) ? result.grad_output : at::Tensor(),
            ctx->needs_input_grad(1) ? result.input : at::Tensor(),
            saved[2].defined() && ctx->needs_input_grad(2) ? result.weight : at::Tensor(),
            {}};
  }
};

namespace {

OutputAndStats forward_autograd(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                std::optional<double> momentum, double eps) {
  check_statistics_need_no_grad(running_mean, running_var);
  if (needs_decomposition(input, weight, bias))
    return decompose::forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                              momentum, eps);
  const ForwardOptions options{running_mean, running_var, num_batches_tracked, training, momentum, eps};
  if (!needs_recording(input, weight, bias)) return forward_below(input, weight, bias, options);
  at::Tensor stats;
  at::Tensor output = BatchNorm::apply(input, weight, bias, options, StatsResult{&stats});
  return {std::move(output), std::move(stats)};
}

OutputAndStats inference_autograd(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                  const at::Tensor& running_var, double eps) {
  return forward_autograd(input, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false,
                          /*momentum=*/0.0, eps);
}

Gradients backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                            const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool training,
                            double eps, OutputMask output_mask) {
  if (needs_decomposition(grad_output, input, weight))
    return decompose::backward(grad_output, input, weight, stats, training, eps, output_mask);
  const BackwardOptions options{stats, training, eps, output_mask};
  if (!needs_recording(grad_output, input, weight)) return backward_below(grad_output, input, weight, options);
  const auto results = BatchNormBackward::apply(grad_output, input, weight, options);
  std::size_t next = 0;
  auto of_result = [&](std::size_t i) { return output_mask[i] ? results[next++] : at::Tensor(); };
  return Gradients{of_result(0), of_result(1), of_result(2)};
}

// Nothing is differentiable here: the statistics are constants to autograd.
void update_running_stats_autograd(const at::Tensor& mean, const at::Tensor& var, c10::SymInt count,
                                   const std::optional<at::Tensor>& running_mean,
                                   const std::optional<at::Tensor>& running_var,
                                   const std::optional<at::Tensor>& num_batches_tracked,
                                   std::optional<double> momentum) {
  const at::AutoDispatchBelowAutograd guard;
  update_running_stats(mean, var, std::move(count), running_mean, running_var, num_batches_tracked, momentum);
}

// Statistics and counter are written through raw pointers, which autograd's version counters do not see.
OutputAndStats forward_in_place(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                std::optional<double> momentum, double eps) {
  OutputAndStats result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = batch_norm_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                momentum, eps);
  }
  if (training)
    for (const auto* written : {&running_mean, &running_var, &num_batches_tracked})
      if (is_given(*written)) torch::autograd::impl::bump_version(**written);
  return result;
}

TORCH_LIBRARY_IMPL(torch_bn, Autograd, m) {
  m.impl("_batch_norm_forward", forward_autograd);
  m.impl("_batch_norm_inference", inference_autograd);
  m.impl("batch_norm_backward", backward_autograd);
  m.impl("_update_running_stats", update_running_stats_autograd);
}

TORCH_LIBRARY_IMPL(torch_bn, ADInplaceOrView, m) {
  m.impl("_batch_norm_forward", forward_in_place);
  m.impl("_batch_norm_inference", torch::CppFunction::makeFallthrough());
  m.impl("batch_norm_backward", torch::CppFunction::makeFallthrough());
  m.impl("_update_running_stats", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torch_bn::ops
