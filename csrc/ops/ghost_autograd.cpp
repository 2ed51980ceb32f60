// Ghost batch norm to autograd and its transforms: the counterpart of autograd.cpp, and the loop over the chunks
// in differentiable operators.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "ghost.h"
#include "recording.h"

namespace torch_bn::ops {
namespace decompose {
namespace {

at::Tensor joined(const std::vector<at::Tensor>& chunks) {
  return chunks.empty() || !chunks.front().defined() ? at::Tensor() : at::cat(chunks);
}

void add(at::Tensor& sum, const at::Tensor& term) {
  if (term.defined()) sum = sum.defined() ? sum + term : term;
}

at::Tensor narrowed(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.defined() ? tensor.to(dtype) : tensor;
}

}  // namespace

constexpr auto kNoRelu = static_cast<int64_t>(Relu::none);

OutputAndStats ghost_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_var,
                             const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                             double eps, int64_t virtual_batch_size) {
  check_ghost_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, eps,
                      virtual_batch_size);
  const Chunks chunks(input, virtual_batch_size);
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> stats;
  for (int64_t i = 0; i < chunks.count(); ++i) {
    auto [output, own] = forward(chunks.of(input, i), weight, bias, running_mean, running_var, num_batches_tracked,
                                 /*training=*/true, momentum, eps, kNoRelu);
    outputs.push_back(std::move(output));
    stats.push_back(std::move(own));
  }
  const int64_t slots = ghost_slots(input, virtual_batch_size).guard_int(__FILE__, __LINE__);
  while (static_cast<int64_t>(stats.size()) < slots) stats.push_back(at::zeros_like(stats.front()));
  return {at::cat(outputs), at::stack(stats)};
}

// In float64 throughout, so that sums over the chunks are rounded once.
Gradients ghost_backward(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const at::Tensor& stats, double eps,
                         int64_t virtual_batch_size, OutputMask output_mask) {
  check_ghost_backward(grad_output, input, weight, stats, virtual_batch_size);
  const Chunks chunks(input, virtual_batch_size);
  const at::Tensor g = grad_output.to(at::kDouble);
  const at::Tensor x = input.to(at::kDouble);
  const auto w = is_given(weight) ? std::optional<at::Tensor>(weight->to(at::kDouble)) : std::nullopt;
  std::vector<at::Tensor> grad_inputs;
  at::Tensor grad_weight;
  at::Tensor grad_bias;
  for (int64_t i = 0; i < chunks.count(); ++i) {
    const auto [of_input, of_weight, of_bias] =
        backward(chunks.of(g, i), chunks.of(x, i), w, stats.select(0, i),
                 /*training=*/true, eps, output_mask, std::nullopt, kNoRelu);
    grad_inputs.push_back(of_input);
    add(grad_weight, of_weight);
    add(grad_bias, of_bias);
  }
  const auto dtype = parameter_dtype(input, weight);
  return {narrowed(joined(grad_inputs), input.scalar_type()), narrowed(grad_weight, dtype),
          narrowed(grad_bias, dtype)};
}

BackwardGradients ghost_double_backward(const Gradients& grads, const at::Tensor& grad_output,
                                        const at::Tensor& input, const at::Tensor& weight, const at::Tensor& stats,
                                        double eps, int64_t virtual_batch_size) {
  const Chunks chunks(input, virtual_batch_size);
  const auto& [of_input, of_weight, of_bias] = grads;
  const at::Tensor g = grad_output.to(at::kDouble);
  const at::Tensor x = input.to(at::kDouble);
  const at::Tensor w = narrowed(weight, at::kDouble);
  std::vector<at::Tensor> to_g;
  std::vector<at::Tensor> to_x;
  BackwardGradients result;
  for (int64_t i = 0; i < chunks.count(); ++i) {
    const Gradients own{of_input.defined() ? chunks.of(of_input, i) : at::Tensor(), of_weight, of_bias};
    auto part =
        double_backward(own, chunks.of(g, i), chunks.of(x, i), w, stats.select(0, i), /*training=*/true, eps,
                        /*bias=*/{}, kNoRelu);
    to_g.push_back(std::move(part.grad_output));
    to_x.push_back(std::move(part.input));
    add(result.weight, part.weight);
  }
  result.grad_output = narrowed(joined(to_g), grad_output.scalar_type());
  result.input = narrowed(joined(to_x), input.scalar_type());
  if (result.weight.defined()) result.weight = result.weight.to(weight.scalar_type());
  return result;
}

}  // namespace decompose

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What takes no part in differentiation, passed beside the variables.
struct GhostForwardOptions {
  const std::optional<at::Tensor>& running_mean;
  const std::optional<at::Tensor>& running_var;
  const std::optional<at::Tensor>& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  int64_t virtual_batch_size;
};

struct GhostBackwardOptions {
  const at::Tensor& stats;
  double eps;
  int64_t virtual_batch_size;
  OutputMask output_mask;
};

OutputAndStats ghost_forward_below(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                   const std::optional<at::Tensor>& bias, const GhostForwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  return ghost_batch_norm_forward(input, weight, bias, options.running_mean, options.running_var,
                                  options.num_batches_tracked, options.momentum, options.eps,
                                  options.virtual_batch_size);
}

Gradients ghost_backward_below(const at::Tensor& grad_output, const at::Tensor& input,
                               const std::optional<at::Tensor>& weight, const GhostBackwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  return ghost_batch_norm_backward(grad_output, input, weight, options.stats, options.eps,
                                   options.virtual_batch_size, options.output_mask);
}

}  // namespace

// The names of these two structs are what users see in a result's grad_fn.

// Running statistics are never saved: a second forward before the backward may change them.
struct GhostBatchNorm : Function<GhostBatchNorm> {
  static constexpr bool is_traceable = true;  // compiled autograd may look into the backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const GhostForwardOptions& options,
                            StatsResult result) {
    auto [output, stats] = ghost_forward_below(input, weight, bias, options);
    ctx->save_for_backward({input, tensor_or_undefined(weight), stats});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["virtual_batch_size"] = options.virtual_batch_size;
    if (is_given(bias)) ctx->saved_data["bias_sizes"] = bias->sym_sizes();
    *result.stats = std::move(stats);
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    if (!grads[0].defined()) return variable_list(5);
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& weight = saved[1];
    const auto bias_sizes = entry_of(*ctx, "bias_sizes");
    const OutputMask mask = wanted(*ctx, weight.defined(), !bias_sizes.isNone());
    auto gradients = ghost_batch_norm_backward(grads[0], saved[0], optional_of(weight), saved[2],
                                               ctx->saved_data["eps"].toDouble(),
                                               ctx->saved_data["virtual_batch_size"].toInt(), mask);
    reshape_parameters(gradients, mask, weight, bias_sizes);
    auto& [grad_input, grad_weight, grad_bias] = gradients;
    return {grad_input, grad_weight, grad_bias, {}, {}};
  }
};

struct GhostBatchNormBackward : Function<GhostBatchNormBackward> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               const std::optional<at::Tensor>& weight, const GhostBackwardOptions& options) {
    const Gradients gradients = ghost_backward_below(grad_output, input, weight, options);
    ctx->save_for_backward({grad_output, input, tensor_or_undefined(weight), options.stats});
    ctx->set_materialize_grads(false);
    ctx->saved_data["eps"] = options.eps;
    ctx->saved_data["virtual_batch_size"] = options.virtual_batch_size;
    ctx->saved_data["mask"] =
        c10::List<bool>({options.output_mask[0], options.output_mask[1], options.output_mask[2]});
    return asked_for(gradients);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto mask = ctx->saved_data["mask"].toBoolList();
    const Gradients of_results = by_mask(mask, grads);
    auto result = decompose::ghost_double_backward(of_results, saved[0], saved[1], saved[2], saved[3],
                                                   ctx->saved_data["eps"].toDouble(),
                                                   ctx->saved_data["virtual_batch_size"].toInt());
    return {ctx->needs_input_grad(0) ? result.grad_output : at::Tensor(),
            ctx->needs_input_grad(1) ? result.input : at::Tensor(),
            saved[2].defined() && ctx->needs_input_grad(2) ? result.weight : at::Tensor(),
            {}};
  }
};

namespace {

OutputAndStats ghost_forward_autograd(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const std::optional<at::Tensor>& running_mean,
                                      const std::optional<at::Tensor>& running_var,
                                      const std::optional<at::Tensor>& num_batches_tracked,
                                      std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  check_statistics_need_no_grad(running_mean, running_var);
  if (needs_decomposition(input, weight, bias))
    return decompose::ghost_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum,
                                    eps, virtual_batch_size);
  const GhostForwardOptions options{running_mean, running_var, num_batches_tracked,
                                    momentum,     eps,         virtual_batch_size};
  if (!needs_recording(input, weight, bias)) return ghost_forward_below(input, weight, bias, options);
  at::Tensor stats;
  at::Tensor output = GhostBatchNorm::apply(input, weight, bias, options, StatsResult{&stats});
  return {std::move(output), std::move(stats)};
}

Gradients ghost_backward_autograd(const at::Tensor& grad_output, const at::Tensor& input,
                                  const std::optional<at::Tensor>& weight, const at::Tensor& stats, double eps,
                                  int64_t virtual_batch_size, OutputMask output_mask) {
  if (needs_decomposition(grad_output, input, weight))
    return decompose::ghost_backward(grad_output, input, weight, stats, eps, virtual_batch_size, output_mask);
  const GhostBackwardOptions options{stats, eps, virtual_batch_size, output_mask};
  if (!needs_recording(grad_output, input, weight))
    return ghost_backward_below(grad_output, input, weight, options);
  const auto results = GhostBatchNormBackward::apply(grad_output, input, weight, options);
  return by_mask(output_mask, results);
}

OutputAndStats ghost_forward_in_place(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                      const std::optional<at::Tensor>& bias,
                                      const std::optional<at::Tensor>& running_mean,
                                      const std::optional<at::Tensor>& running_var,
                                      const std::optional<at::Tensor>& num_batches_tracked,
                                      std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  OutputAndStats result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = ghost_batch_norm_forward(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                      momentum, eps, virtual_batch_size);
  }
  bump_versions({&running_mean, &running_var, &num_batches_tracked});
  return result;
}

TORCH_LIBRARY_IMPL(torch_bn, Autograd, m) {
  m.impl("_ghost_batch_norm_forward", ghost_forward_autograd);
  m.impl("_ghost_batch_norm_backward", ghost_backward_autograd);
}

TORCH_LIBRARY_IMPL(torch_bn, ADInplaceOrView, m) {
  m.impl("_ghost_batch_norm_forward", ghost_forward_in_place);
  m.impl("_ghost_batch_norm_backward", torch::CppFunction::makeFallthrough());
}

// Where vmap meets the private operators: in a backward with batched gradients. The public one is looped over
// above it, and its chunks fold the samples into their channels.
TORCH_LIBRARY_IMPL(torch_bn, FuncTorchBatched, m) {
  m.impl("_ghost_batch_norm_forward", decompose::ghost_forward);
  m.impl("_ghost_batch_norm_backward", decompose::ghost_backward);
}

}  // namespace
}  // namespace torch_bn::ops
