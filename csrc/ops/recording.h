// What the autograd kernels have in common: whether a call is recorded, and how.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <string>

#include "ops.h"

namespace torch_bn::ops {

inline bool needs_decomposition(const at::Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0).defined();
}
inline bool needs_decomposition(const std::optional<at::Tensor>& tensor) {
  return is_given(tensor) && needs_decomposition(*tensor);
}

// A C++ Function has no forward-mode derivative and is opaque to torch.func: there the decomposition serves.
template <typename... Inputs>
bool needs_decomposition(const Inputs&... inputs)
  requires(sizeof...(Inputs) > 1)
{
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerBackMode) || (needs_decomposition(inputs) || ...);
}

inline bool requires_grad(const at::Tensor& tensor) {
  return tensor.requires_grad();
}
inline bool requires_grad(const std::optional<at::Tensor>& tensor) {
  return is_given(tensor) && tensor->requires_grad();
}

template <typename... Inputs>
bool needs_recording(const Inputs&... inputs) {
  return at::GradMode::is_enabled() && (requires_grad(inputs) || ...);
}

// Takes the statistics past autograd: as a result they would have to be marked non-differentiable, which compiled
// autograd does not know.
struct StatsResult {
  at::Tensor* stats;
};

// Statistics and counter are written through raw pointers, which autograd's version counters do not see.
// Tensors of inference mode have none.
inline void bump_versions(std::initializer_list<const std::optional<at::Tensor>*> written) {
  for (const auto* tensor : written)
    if (is_given(*tensor) && !(*tensor)->is_inference()) torch::autograd::impl::bump_version(**tensor);
}

// A recorded backward returns the gradients that its mask asks for, and no others, in order.
inline torch::autograd::variable_list asked_for(const Gradients& gradients) {
  torch::autograd::variable_list results;
  for (const at::Tensor& gradient : {std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)})
    if (gradient.defined()) results.push_back(gradient);
  return results;
}

// Which gradients a Function's backward is asked for; edges are numbered over the arguments that were given.
inline OutputMask wanted(const torch::autograd::AutogradContext& ctx, bool has_weight, bool has_bias) {
  return {ctx.needs_input_grad(0), has_weight && ctx.needs_input_grad(1),
          has_bias && ctx.needs_input_grad(has_weight ? 2 : 1)};
}

// Parameters may have any shape with C elements, and their gradients get it; sizes that are none are (C).
inline void reshape_parameters(Gradients& gradients, const OutputMask& mask, const at::Tensor& weight,
                               const c10::IValue& bias_sizes) {
  auto& [grad_input, grad_weight, grad_bias] = gradients;
  if (mask[1] && weight.dim() != 1) grad_weight = grad_weight.reshape_symint(weight.sym_sizes());
  if (mask[2] && !bias_sizes.isNone() && bias_sizes.toListRef().size() != 1)
    grad_bias = grad_bias.reshape_symint(bias_sizes.toSymIntVector());
}

// An entry of a Function's dictionary, none if there is none of this name.
inline c10::IValue entry_of(const torch::autograd::AutogradContext& ctx, const std::string& name) {
  const auto found = ctx.saved_data.find(name);
  return found == ctx.saved_data.end() ? c10::IValue() : found->second;
}

// The other way: each at its place, undefined where none was asked for.
template <typename Mask>
Gradients by_mask(const Mask& mask, const torch::autograd::variable_list& results) {
  std::size_t next = 0;
  auto of_result = [&](std::size_t i) { return mask[i] ? results[next++] : at::Tensor(); };
  // In declared order: a braced list is evaluated from left to right.
  return Gradients{of_result(0), of_result(1), of_result(2)};
}

}  // namespace torch_bn::ops
