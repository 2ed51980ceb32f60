// What the autograd kernels have in common: whether a call is recorded, and how.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

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

inline std::optional<at::Tensor> optional_of(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// Takes the statistics past autograd: as a result they would have to be marked non-differentiable, which compiled
// autograd does not know.
struct StatsResult {
  at::Tensor* stats;
};

}  // namespace torch_bn::ops
