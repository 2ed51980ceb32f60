// The autograd functions. Forward and backward are both operators; each has an autograd kernel, so that a
// backward that is itself recorded can be differentiated again, to any order.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "checks.h"
#include "decompose.h"
#include "plain.h"
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
  int64_t relu;
  bool plain;
};

OutputAndStats forward_below(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const ForwardOptions& options) {
  if (options.plain) {
    auto result = batch_norm_forward_at_once(input, weight, bias, options.running_mean, options.running_var,
                                             options.num_batches_tracked, options.training, options.momentum,
                                             options.eps, options.relu);
    if (options.training)
      bump_versions({&options.running_mean, &options.running_var, &options.num_batches_tracked});
    return result;
  }
  at::AutoDispatchBelowAutograd guard;
  return batch_norm_in_mode(input, weight, bias, options.running_mean, options.running_var,
                            options.num_batches_tracked, options.training, options.momentum, options.eps,
                            options.relu);
}

struct BackwardOptions {
  const at::Tensor& stats;
  bool training;
  double eps;
  OutputMask output_mask;
  const std::optional<at::Tensor>& bias;  // for the mask of a ReLU behind; a constant to autograd
  int64_t relu;
};

Gradients backward_below(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  return batch_norm_backward(grad_output, input, weight, options.stats, options.training, options.eps,
                             options.output_mask, options.bias, options.relu);
}

// What backward must know beside the tensors.
struct Constants {
  double eps = 0.0;
  bool training = false;
  bool has_bias = false;
  int64_t relu = 0;
  c10::IValue bias_sizes{};  // none for (C)

  // Through a Function's dictionary. Flags share one number: every entry costs.
  void keep_in(AutogradContext& ctx) const {
    ctx.saved_data["eps"] = eps;
    ctx.saved_data["flags"] = (training ? 1 : 0) | (has_bias ? 2 : 0) | relu << 2;
    if (!bias_sizes.isNone()) ctx.saved_data["bias_sizes"] = bias_sizes;
  }
  static Constants kept_in(AutogradContext& ctx) {
    const int64_t flags = ctx.saved_data["flags"].toInt();
    return {ctx.saved_data["eps"].toDouble(), (flags & 1) != 0, (flags & 2) != 0, flags >> 2,
            entry_of(ctx, "bias_sizes")};
  }
};

Constants constants_of(const ForwardOptions& options, const std::optional<at::Tensor>& bias) {
  const bool other_shape = is_given(bias) && bias->dim() != 1;
  return {options.eps, options.training, is_given(bias), options.relu,
          other_shape ? c10::IValue(bias->sym_sizes()) : c10::IValue()};
}

void save(AutogradContext& ctx, const at::Tensor& input, const std::optional<at::Tensor>& weight,
          const std::optional<at::Tensor>& bias, const at::Tensor& stats, int64_t relu) {
  variable_list kept;
  kept.reserve(4);  // and no initialiser list, which copies every tensor twice
  kept.push_back(input);
  kept.push_back(tensor_or_undefined(weight));
  kept.push_back(stats);
  if (is(relu, Relu::after)) kept.push_back(tensor_or_undefined(bias));
  ctx.save_for_backward(std::move(kept));
  ctx.set_materialize_grads(false);
}

// From what `save` has saved.
Gradients gradients_of(const AutogradContext& ctx, const at::Tensor& grad_output, const Constants& constants) {
  const auto saved = ctx.get_saved_variables();
  const at::Tensor& input = saved[0];
  const at::Tensor& weight = saved[1];
  const at::Tensor& stats = saved[2];
  const OutputMask mask = wanted(ctx, weight.defined(), constants.has_bias);
  const auto bias = saved.size() > 3 ? optional_of(saved[3]) : std::nullopt;
  const bool plain = !at::GradMode::is_enabled() && nobody_looks_on() && is_plain(grad_output) &&
                     is_plain(input) && is_plain(stats) && (!weight.defined() || is_plain(weight)) &&
                     is_plain(bias) && !needs_decomposition(grad_output, input, optional_of(weight));
  auto gradients =
      plain ? batch_norm_backward_at_once(
                  mask[0] && may_overwrite(grad_output, input) ? grad_output : at::Tensor(), grad_output, input,
                  optional_of(weight), stats, constants.training, mask, bias, constants.relu)
            : batch_norm_backward(grad_output, input, optional_of(weight), stats, constants.training,
                                  constants.eps, mask, bias, constants.relu);
  reshape_parameters(gradients, mask, weight, constants.bias_sizes);
  return gradients;
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
    save(*ctx, input, weight, bias, stats, options.relu);
    constants_of(options, bias).keep_in(*ctx);
    *result.stats = std::move(stats);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    auto [grad_input, grad_weight, grad_bias] = gradients_of(*ctx, grads[0], Constants::kept_in(*ctx));
    return {grad_input, grad_weight, grad_bias, {}, {}};
  }
};

struct BatchNormBackward : Function<BatchNormBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
    const Gradients gradients = backward_below(grad_output, input, weight, options);
    ctx->save_for_backward(
        {grad_output, input, tensor_or_undefined(weight), options.stats, tensor_or_undefined(options.bias)});
    ctx->set_materialize_grads(false);
    ctx->saved_data["relu"] = options.relu;
    ctx->saved_data["training"] = options.training;
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["mask"] =
        c10::List<bool>({options.output_mask[0], options.output_mask[1], options.output_mask[2]});
    return asked_for(gradients);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = ctx->saved_data["mask"].toBoolList();
    const Gradients of_results = by_mask(mask, grads);
    auto result = decompose::double_backward(
        of_results, saved[0], saved[1], saved[2], saved[3], ctx->saved_data["training"].toBool(),
        ctx->saved_data["eps"].toDouble(), saved[4], ctx->saved_data["relu"].toInt());
    return {ctx->needs_input_grad(0) ? result.grad_output : at::Tensor(),
            ctx->needs_input_grad(1) ? result.input : at::Tensor(),
            saved[2].defined() && ctx->needs_input_grad(2) ? result.weight : at::Tensor(),
            {}};
  }
};

namespace {

// The node of a plain call: the Function's own, but for what its dictionary, its name and its lists cost a small
// layer. They are made where compiled autograd asks for them.
struct PlainNode final : torch::autograd::CppNode<BatchNorm> {
  Constants constants;
  bool has_weight = false;

  [[nodiscard]] std::string name() const override {
    return c10::demangle(typeid(torch::autograd::CppNode<BatchNorm>).name());
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list results(num_outputs());
    if (!grads[0].defined()) return results;
    auto [grad_input, grad_weight, grad_bias] = gradients_of(ctx_, grads[0], constants);
    results[0] = std::move(grad_input);
    if (has_weight) results[1] = std::move(grad_weight);
    if (constants.has_bias) results.back() = std::move(grad_bias);
    return results;
  }

  void compiled_args(torch::autograd::CompiledNodeArgs& args) const override {
    const_cast<PlainNode*>(this)->complete();
    CppNode::compiled_args(args);
  }

  variable_list apply_with_saved(const variable_list& grads, torch::autograd::SwapSavedVariables& saved) override {
    complete();
    return CppNode::apply_with_saved(grads, saved);
  }

 private:
  void complete() {
    is_variable_input_ = {true, has_weight, constants.has_bias, false, false};
    constants.keep_in(ctx_);
  }
};

// Function::apply without what a plain call has no use for: one new output, no views, nothing changed in place.
OutputAndStats record_plain(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const ForwardOptions& options) {
  OutputAndStats result;
  {
    const at::AutoGradMode off(false);
    result = forward_below(input, weight, bias, options);
  }
  auto& [output, stats] = result;
  auto node = c10::make_intrusive<PlainNode>();
  node->constants = constants_of(options, bias);
  node->has_weight = is_given(weight);
  torch::autograd::edge_list edges;
  edges.reserve(3);
  edges.push_back(torch::autograd::impl::gradient_edge(input));
  for (const auto* parameter : {&weight, &bias})
    if (is_given(*parameter)) edges.push_back(torch::autograd::impl::gradient_edge(**parameter));
  node->set_next_edges(std::move(edges));
  node->set_ctx_grad_fn(node);
  save(node->ctx_, input, weight, bias, stats, options.relu);
  torch::autograd::set_history(output, node);
  node->save_variables_to_ctx();
  return result;
}

OutputAndStats recorded_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias, const ForwardOptions& options) {
  if (!needs_recording(input, weight, bias)) return forward_below(input, weight, bias, options);
  if (options.plain) return record_plain(input, weight, bias, options);
  at::Tensor stats;
  at::Tensor output = BatchNorm::apply(input, weight, bias, options, StatsResult{&stats});
  return {std::move(output), std::move(stats)};
}

OutputAndStats forward_autograd(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                std::optional<double> momentum, double eps, int64_t relu) {
  check_statistics_need_no_grad(running_mean, running_var);
  if (needs_decomposition(input, weight, bias))
    return decompose::forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                              momentum, eps, relu);
  return recorded_forward(input, weight, bias,
                          {running_mean, running_var, num_batches_tracked, training, momentum, eps, relu,
                           /*plain=*/false});
}

OutputAndStats inference_autograd(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                  const at::Tensor& running_var, double eps, int64_t relu) {
  return forward_autograd(input, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false,
                          /*momentum=*/0.0, eps, relu);
}

Gradients backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                            const std::optional<at::Tensor>& weight, const at::Tensor& stats, bool training,
                            double eps, OutputMask output_mask, const std::optional<at::Tensor>& bias,
                            int64_t relu) {
  if (needs_decomposition(grad_output, input, weight))
    return decompose::backward(grad_output, input, weight, stats, training, eps, output_mask, bias, relu);
  const BackwardOptions options{stats, training, eps, output_mask, bias, relu};
  if (!needs_recording(grad_output, input, weight)) return backward_below(grad_output, input, weight, options);
  const auto results = BatchNormBackward::apply(grad_output, input, weight, options);
  return by_mask(output_mask, results);
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

OutputAndStats forward_in_place(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                std::optional<double> momentum, double eps, int64_t relu) {
  OutputAndStats result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = batch_norm_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                                momentum, eps, relu);
  }
  if (training) bump_versions({&running_mean, &running_var, &num_batches_tracked});
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

std::optional<at::Tensor> batch_norm_if_plain(Relu relu, const at::Tensor& input,
                                              const std::optional<at::Tensor>& weight,
                                              const std::optional<at::Tensor>& bias,
                                              const std::optional<at::Tensor>& running_mean,
                                              const std::optional<at::Tensor>& running_var,
                                              const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                              std::optional<double> momentum, double eps) {
  const bool plain = nobody_looks_on() && is_plain(input) && is_plain(weight) && is_plain(bias) &&
                     is_plain(running_mean) && is_plain(running_var) && is_plain(num_batches_tracked) &&
                     !needs_decomposition(input, weight, bias);
  if (!plain) return std::nullopt;
  const ForwardOptions options{running_mean, running_var, num_batches_tracked,        training,
                               momentum,     eps,         static_cast<int64_t>(relu), /*plain=*/true};
  const bool active = autograd_is_active();
  if (active) check_statistics_need_no_grad(running_mean, running_var);
  auto result =
      active ? recorded_forward(input, weight, bias, options) : forward_below(input, weight, bias, options);
  return std::get<0>(std::move(result));
}

}  // namespace torch_bn::ops
