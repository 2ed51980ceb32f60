#include "../ops/sync.h"

#include <torch_bn/sync.h>

#include <cstdlib>
#include <string_view>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "serve.h"

namespace torch_bn {
namespace {

bool checks_every_call() {
  const char* value = std::getenv("TORCH_BN_SYNC_DEBUG");
  return value != nullptr && *value != '\0' && std::string_view(value) != "0";
}

template <typename Layer>
constexpr ops::Relu relu_of() {
  if constexpr (std::is_same_v<Layer, SyncBatchNormReLU1dImpl>) return ops::Relu::after;
  if constexpr (std::is_same_v<Layer, SyncReLUBatchNorm1dImpl>) return ops::Relu::before;
  return ops::Relu::none;
}

}  // namespace

namespace detail {

template <typename Derived>
void SyncBatchNormImplBase<Derived>::reset() {
  BatchNormImplBase<Derived>::reset();
  agreed_ = false;
}

template <typename Derived>
torch::Tensor SyncBatchNormImplBase<Derived>::forward(const torch::Tensor& input) {
  constexpr ops::Relu kRelu = relu_of<Derived>();
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
  TORCH_CHECK(!this->options.virtual_batch_size() && !this->options.channels_last(), Derived::layer_name(),
              " has neither virtual_batch_size nor channels_last");
  const bool training = this->is_training();
  const bool tracks = this->options.track_running_stats();
  const int64_t processes = training && !group_.empty() ? c10d::resolve_process_group(group_)->getSize() : 1;
  if (processes == 1)
    return nn::batch_norm(kRelu, input, this->weight, this->bias, this->running_mean, this->running_var,
                          training && tracks ? this->num_batches_tracked : torch::Tensor(), training || !tracks,
                          this->options.momentum(), this->options.eps());
  TORCH_CHECK(input.is_cpu(), Derived::layer_name(), " expected its input on CPU (got ", input.device(), ")");
  const torch::Tensor& counter = this->num_batches_tracked;
  const bool apart = nn::is_counted_apart(counter);
  const bool agree = !agreed_ || checks_every_call();
  auto output = ops::sync::batch_norm(
      input, ops::optional_of(this->weight), ops::optional_of(this->bias), ops::optional_of(this->running_mean),
      ops::optional_of(this->running_var), apart ? std::nullopt : ops::optional_of(counter),
      apart ? nn::factor_of(this->options.momentum(), counter) : this->options.momentum(), this->options.eps(),
      group_, processes, name_, agree, static_cast<int64_t>(kRelu));
  if (apart) counter.add_(1);
  agreed_ = true;
  return output;
}

template class SyncBatchNormImplBase<SyncBatchNorm1dImpl>;
template class SyncBatchNormImplBase<SyncBatchNormReLU1dImpl>;
template class SyncBatchNormImplBase<SyncReLUBatchNorm1dImpl>;

}  // namespace detail

const char* SyncBatchNorm1dImpl::layer_name() {
  return "SyncBatchNorm1d";
}
const char* SyncBatchNormReLU1dImpl::layer_name() {
  return "SyncBatchNormReLU1d";
}
const char* SyncReLUBatchNorm1dImpl::layer_name() {
  return "SyncReLUBatchNorm1d";
}

}  // namespace torch_bn
