// What the autograd kernels have in common: whether a call is recorded, and how.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>

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
inline void bump_versions(std::initializer_list<const std::optional<at::Tensor>*> written) {
  for (const auto* tensor : written)
    if (is_given(*tensor)) torch::autograd::impl::bump_version(**tensor);
}

// A recorded backward returns the gradients that its mask asks for, and no others, in order.
inline torch::autograd::variable_list asked_for(const Gradients& gradients) {
  torch::autograd::variable_list results;
  for (const at::Tensor& gradient : {std::get<0>(gradients), std::get<1>(gradients), std::get<2>(gradients)})
    if (gradient.defined()) results.push_back(gradient);
  return results;
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
