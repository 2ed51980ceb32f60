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

}  // namespace

const char* SyncBatchNorm1dImpl::layer_name() {
  return "SyncBatchNorm1d";
}

torch::Tensor SyncBatchNorm1dImpl::forward(const torch::Tensor& input) {
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
  const bool training = is_training();
  const bool tracks = options.track_running_stats();
  const int64_t processes = training && !group_.empty() ? c10d::resolve_process_group(group_)->getSize() : 1;
  if (processes == 1)
    return nn::batch_norm(ops::Relu::none, input, weight, bias, running_mean, running_var,
                          training && tracks ? num_batches_tracked : torch::Tensor(), training || !tracks,
                          options.momentum(), options.eps());
  TORCH_CHECK(input.is_cpu(), "SyncBatchNorm1d expected its input on CPU (got ", input.device(), ")");
  const bool agree = !agreed_ || checks_every_call();
  auto output = ops::sync::batch_norm(input, ops::optional_of(weight), ops::optional_of(bias),
                                      ops::optional_of(running_mean), ops::optional_of(running_var),
                                      ops::optional_of(num_batches_tracked), options.momentum(), options.eps(),
                                      group_, processes, name_, agree);
  agreed_ = true;
  return output;
}

}  // namespace torch_bn
