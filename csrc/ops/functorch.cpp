// The transforms of torch.func. Under vmap the batch dimension is folded into the channels, so that one call of
// the operator serves all samples and is recorded by autograd as such; what does not fold goes sample-wise through
// the decomposition.
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/Tensor.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "decompose.h"

namespace torch_bn::ops {
namespace {

namespace functorch = at::functorch;

// Of the vmap that is being interpreted: the innermost that any argument takes part in.
int64_t current_level(std::initializer_list<std::optional<at::Tensor>> arguments) {
  int64_t level = 0;
  for (const auto& argument : arguments) {
    const auto* batched = is_given(argument) ? functorch::maybeGetBatchedImpl(*argument) : nullptr;
    if (batched != nullptr) level = std::max(level, batched->level());
  }
  return level;
}

// A tensor and where vmap's dimension lies in it, if anywhere.
struct Argument {
  at::Tensor value;
  std::optional<int64_t> batch_dim;

  bool given() const { return value.defined(); }
  bool batched() const { return batch_dim.has_value(); }
  c10::SymInt batch_size() const { return value.sym_size(*batch_dim); }
  // With the batch dimension at `position`, added there where there was none.
  at::Tensor with_batch_at(int64_t position, const c10::SymInt& size) const {
    if (batched()) return value.movedim(*batch_dim, position);
    const at::Tensor added = value.unsqueeze(position);
    auto sizes = added.sym_sizes().vec();
    sizes[position] = size;
    return added.expand_symint(sizes);
  }
};

Argument unwrap(const std::optional<at::Tensor>& tensor, int64_t level) {
  if (!is_given(tensor)) return {};
  const auto* batched = functorch::maybeGetBatchedImpl(*tensor);
  if (batched == nullptr || batched->level() != level) return {*tensor, std::nullopt};
  return {batched->value(), batched->bdim()};
}

// One updated value cannot hold what a whole batch of inputs makes of it. The words are torch's.
void check_statistics_can_be_updated(const at::Tensor& given, const std::optional<at::Tensor>& running_mean,
                                     const std::optional<at::Tensor>& running_var) {
  const int64_t level = current_level({given, running_mean, running_var});
  const Argument input = unwrap(given, level);
  const Argument mean = unwrap(running_mean, level);
  const Argument var = unwrap(running_var, level);
  TORCH_CHECK(!input.batched() || (!mean.given() && !var.given()) || (mean.batched() && var.batched()),
              "Batch norm got a batched tensor as input while the running_mean or running_var, which will be "
              "updated in place, were not batched.\nIf you are using a module and do not need eval mode, please "
              "set `track_running_stats` to be False.If you are using a prebuilt module and do not need eval "
              "mode, please see the functorch website for resources on how to patch your module to work with "
              "vmap");
}

// Written statistics must fold as views of themselves.
bool folds_in_place(const Argument& statistics) {
  return !statistics.given() ||
         (statistics.batched() && statistics.value.movedim(*statistics.batch_dim, 0).is_contiguous());
}

OutputAndStats forward_batched(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& running_mean,
                               const std::optional<at::Tensor>& running_var,
                               const std::optional<at::Tensor>& num_batches_tracked, bool training,
                               std::optional<double> momentum, double eps, int64_t relu) {
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, relu);
  const int64_t level = current_level({input, weight, bias, running_mean, running_var, num_batches_tracked});
  const Argument x = unwrap(input, level);
  const Argument mean = unwrap(running_mean, level);
  const Argument var = unwrap(running_var, level);
  const Argument counter = unwrap(num_batches_tracked, level);
  if (training) check_statistics_can_be_updated(input, running_mean, running_var);
  const bool folds = !training || (folds_in_place(mean) && folds_in_place(var) &&
                                   !(counter.batched() && !momentum));  // one momentum serves all samples
  if (!folds)
    return decompose::forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                              momentum, eps, relu);

  const c10::impl::ExcludeDispatchKeyGuard below(c10::DispatchKey::FuncTorchBatched);
  const Argument w = unwrap(weight, level);
  const Argument b = unwrap(bias, level);
  c10::SymInt batch = 1;
  for (const auto* argument : {&x, &w, &b, &mean, &var})
    if (argument->batched()) batch = argument->batch_size();
  auto fold_channels = [&](const Argument& channels) {
    if (!channels.given()) return std::optional<at::Tensor>();
    const Argument flat = channels.batched()
                              ? Argument{channels.value.movedim(*channels.batch_dim, 0).flatten(1), 0}
                              : Argument{channels.value.flatten(), std::nullopt};
    return std::optional<at::Tensor>(flat.with_batch_at(0, batch).flatten());
  };
  const at::Tensor spread = x.with_batch_at(1, batch);  // (N, B, C) or (N, B, C, L)
  const auto folded_mean = fold_channels(mean);
  const auto folded_var = fold_channels(var);
  const bool counts_apart = training && counter.batched();
  auto [output, stats] = batch_norm_in_mode(
      spread.flatten(1, 2), fold_channels(w), fold_channels(b), folded_mean, folded_var,
      counter.given() && !counts_apart ? std::optional<at::Tensor>(counter.value) : std::nullopt, training,
      momentum, eps, relu);
  if (counts_apart) counter.value.add_(1);
  const auto channels = input.sym_size(1);
  return {functorch::addBatchDim(output.unflatten_symint(1, {batch, channels}), 1, level),
          functorch::addBatchDim(stats.unflatten_symint(1, {batch, channels}), 1, level)};
}

OutputAndStats inference_batched(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                 const std::optional<at::Tensor>& bias, const at::Tensor& running_mean,
                                 const at::Tensor& running_var, double eps, int64_t relu) {
  return forward_batched(input, weight, bias, running_mean, running_var, std::nullopt, /*training=*/false,
                         /*momentum=*/0.0, eps, relu);
}

// The public operator under any transform of torch.func. The counter is counted up in sight of the transforms,
// for some refuse to change a captured one (torch's layer counts so too); the cumulative average reads a copy.
template <Relu kRelu>
at::Tensor batch_norm_transformed(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked, bool training,
                                  std::optional<double> momentum, double eps) {
  constexpr auto relu = static_cast<int64_t>(kRelu);
  // functionalize() takes no operator apart that writes, so it is given the parts.
  if (at::functionalization::impl::isFunctionalTensor(input))
    return std::get<0>(decompose::forward(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                          training, momentum, eps, relu));
  std::optional<at::Tensor> counted;
  if (training && is_given(num_batches_tracked)) {
    check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, relu);
    check_statistics_can_be_updated(input, running_mean, running_var);
    if (!momentum) counted = num_batches_tracked->clone();
    num_batches_tracked->add_(at::native::wrapped_scalar_tensor(1));  // named add_.Tensor where it is refused
  }
  return std::get<0>(
      batch_norm_in_mode(input, weight, bias, running_mean, running_var, counted, training, momentum, eps, relu));
}

TORCH_LIBRARY_IMPL(torch_bn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("batch_norm", batch_norm_transformed<Relu::none>);
  m.impl("batch_norm_relu", batch_norm_transformed<Relu::after>);
  m.impl("relu_batch_norm", batch_norm_transformed<Relu::before>);
}

TORCH_LIBRARY_IMPL(torch_bn, FuncTorchBatched, m) {
  m.impl("_batch_norm_forward", forward_batched);
  m.impl("_batch_norm_inference", inference_batched);
  m.impl("batch_norm_backward", decompose::backward);
  m.impl("_update_running_stats", decompose::update_running_stats);
}

}  // namespace
}  // namespace torch_bn::ops
