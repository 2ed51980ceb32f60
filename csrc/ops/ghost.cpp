// Ghost batch norm: schemas, entry points, checks, shapes, and the public operator.
#include "ghost.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"

namespace torch_bn::ops {

TORCH_LIBRARY_FRAGMENT(torch_bn, m) {
  m.def(
      "ghost_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, bool training, float? momentum, float eps, "
      "int virtual_batch_size) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_ghost_batch_norm_forward(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, "
      "int virtual_batch_size) -> (Tensor output, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_ghost_batch_norm_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor stats, float eps, "
      "int virtual_batch_size, bool[3] output_mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
      {at::Tag::pt2_compliant_tag});
}

at::Tensor ghost_batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked, bool training,
                            std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::ghost_batch_norm", "")
                             .typed<decltype(ghost_batch_norm)>();
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                 virtual_batch_size);
}

OutputAndStats ghost_batch_norm_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                        const std::optional<at::Tensor>& bias,
                                        const std::optional<at::Tensor>& running_mean,
                                        const std::optional<at::Tensor>& running_var,
                                        const std::optional<at::Tensor>& num_batches_tracked,
                                        std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::_ghost_batch_norm_forward", "")
                             .typed<decltype(ghost_batch_norm_forward)>();
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                 virtual_batch_size);
}

Gradients ghost_batch_norm_backward(const at::Tensor& grad_output, const at::Tensor& input,
                                    const std::optional<at::Tensor>& weight, const at::Tensor& stats, double eps,
                                    int64_t virtual_batch_size, OutputMask output_mask) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("torch_bn::_ghost_batch_norm_backward", "")
                             .typed<decltype(ghost_batch_norm_backward)>();
  return op.call(grad_output, input, weight, stats, eps, virtual_batch_size, output_mask);
}

namespace {

void check_size(int64_t virtual_batch_size) {
  TORCH_CHECK_VALUE(virtual_batch_size >= 1, "virtual_batch_size should be positive, but got ",
                    virtual_batch_size);
}

}  // namespace

void check_ghost_forward(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, double eps,
                         int64_t virtual_batch_size) {
  check_size(virtual_batch_size);
  check_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true, eps,
                /*relu=*/0);
  if (virtual_batch_size > 1) return;
  // Of chunks of one row, every one must hold several values. An empty batch has none that is refused.
  const bool one_a_row = input.dim() == 2 || TORCH_GUARD_OR_FALSE(input.sym_size(2).sym_eq(1));
  TORCH_CHECK_VALUE(!one_a_row || TORCH_GUARD_OR_FALSE(input.sym_size(0).sym_eq(0)),
                    "Expected more than 1 value per channel when training, got input size torch.Size([1, ",
                    input.sym_size(1), input.dim() == 3 ? ", 1])" : "])");
}

void check_ghost_backward(const at::Tensor& grad_output, const at::Tensor& input,
                          const std::optional<at::Tensor>& weight, const at::Tensor& stats,
                          int64_t virtual_batch_size) {
  check_size(virtual_batch_size);
  TORCH_CHECK(stats.dim() == 3, "stats should have 3 dims not ", stats.dim());
  const auto slots = ghost_slots(input, virtual_batch_size);
  TORCH_SYM_CHECK(stats.sym_size(0).sym_eq(slots), "stats should have ", slots, " slots not ", stats.sym_size(0));
  check_backward(grad_output, input, weight, stats.select(0, 0), std::nullopt, /*relu=*/0);
}

c10::SymInt ghost_slots(const at::Tensor& input, int64_t virtual_batch_size) {
  return (input.sym_size(0).max(1) - 1) / virtual_batch_size + 1;
}

Chunks::Chunks(const at::Tensor& input, int64_t virtual_batch_size) : size_(virtual_batch_size) {
  const auto size = [&](int64_t dim) { return input.sym_size(dim).guard_int(__FILE__, __LINE__); };
  rows_ = size(0);
  count_ = (std::max<int64_t>(rows_, 1) - 1) / size_ + 1;
  const int64_t values_a_row = input.dim() == 3 ? size(2) : 1;
  if (count_ > 1 && rows_ % size_ == 1 && values_a_row == 1) --count_;
}

at::Tensor Chunks::of(const at::Tensor& batch, int64_t chunk) const {
  return batch.narrow(0, begin(chunk), size(chunk));
}

namespace {

// The public operators of the chunks, one after the other: for other devices, whose way they know, and for the
// transforms of torch.func.
at::Tensor by_chunks(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                     const std::optional<at::Tensor>& running_var,
                     const std::optional<at::Tensor>& num_batches_tracked, bool training,
                     std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  check_size(virtual_batch_size);
  if (!training)
    return batch_norm(Relu::none, input, weight, bias, running_mean, running_var, num_batches_tracked, training,
                      momentum, eps);
  check_ghost_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, eps,
                      virtual_batch_size);
  const Chunks chunks(input, virtual_batch_size);
  std::vector<at::Tensor> outputs;
  for (int64_t i = 0; i < chunks.count(); ++i)
    outputs.push_back(batch_norm(Relu::none, chunks.of(input, i), weight, bias, running_mean, running_var,
                                 num_batches_tracked, training, momentum, eps));
  return at::cat(outputs);
}

at::Tensor composite(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                     const std::optional<at::Tensor>& running_var,
                     const std::optional<at::Tensor>& num_batches_tracked, bool training,
                     std::optional<double> momentum, double eps, int64_t virtual_batch_size) {
  if (!training || (!input.is_cpu() && !input.is_meta()))
    return by_chunks(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps,
                     virtual_batch_size);
  return std::get<0>(ghost_batch_norm_forward(input, weight, bias, running_mean, running_var, num_batches_tracked,
                                              momentum, eps, virtual_batch_size));
}

OutputAndStats forward_meta(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                            const std::optional<at::Tensor>& running_var,
                            const std::optional<at::Tensor>& num_batches_tracked,
                            std::optional<double> /*momentum*/, double eps, int64_t virtual_batch_size) {
  check_ghost_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, eps,
                      virtual_batch_size);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty_symint({ghost_slots(input, virtual_batch_size), 2, input.sym_size(1)},
                           input.options().dtype(at::kDouble))};
}

Gradients backward_meta(const at::Tensor& grad_output, const at::Tensor& input,
                        const std::optional<at::Tensor>& weight, const at::Tensor& stats, double /*eps*/,
                        int64_t virtual_batch_size, OutputMask output_mask) {
  check_ghost_backward(grad_output, input, weight, stats, virtual_batch_size);
  const auto options = input.options().dtype(parameter_dtype(input, weight));
  auto per_channel = [&](bool wanted) {
    return wanted ? at::empty_symint({input.sym_size(1)}, options) : at::Tensor();
  };
  return {output_mask[0] ? at::empty_symint(input.sym_sizes(), input.options()) : at::Tensor(),
          per_channel(output_mask[1]), per_channel(output_mask[2])};
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeImplicitAutograd, m) {
  m.impl("ghost_batch_norm", composite);
}

TORCH_LIBRARY_IMPL(torch_bn, FuncTorchDynamicLayerFrontMode, m) {
  m.impl("ghost_batch_norm", by_chunks);
}

TORCH_LIBRARY_IMPL(torch_bn, Meta, m) {
  m.impl("_ghost_batch_norm_forward", forward_meta);
  m.impl("_ghost_batch_norm_backward", backward_meta);
}

}  // namespace
}  // namespace torch_bn::ops
