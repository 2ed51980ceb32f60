// The synchronised layer's private operators on CPU: from tensors to the kernels.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../kernels/sync_api.h"
#include "checks.h"
#include "kernel_args.h"
#include "memory.h"
#include "sync.h"

namespace torch_bn::ops::sync {
namespace {

// Of the row of `parts` that one process has written.
constexpr int64_t kCount = 0;
constexpr int64_t kMark = 1;
constexpr int64_t kFirst = 2;  // mean, or sum(g)

const kernels::SyncTable& sync_kernels() {
  return *active_kernels().sync;
}

// A part without its values.
at::Tensor new_part(const at::Tensor& input, int64_t mark) {
  at::Tensor part = at::zeros({kFirst + 2 * input.size(1)}, input.options().dtype(at::kDouble));
  auto* data = part.mutable_data_ptr<double>();
  data[kCount] = static_cast<double>(input.size(0) * (input.dim() == 3 ? input.size(2) : 1));
  data[kMark] = static_cast<double>(mark);
  return part;
}

at::Tensor moments_cpu(const at::Tensor& input, int64_t mark, int64_t relu) {
  check_relu(relu);
  check_forward_but_rows(input, {}, {}, {}, {}, {}, /*training=*/true, /*eps=*/1.0);
  at::Tensor part = new_part(input, mark);
  if (input.numel() == 0) return part;
  const ForwardCall call(input, {}, {}, {}, {}, /*training=*/true, /*eps=*/1.0, relu);
  auto* values = part.mutable_data_ptr<double>() + kFirst;
  sync_kernels().moments(call.args, values, values + call.args.shape.c);
  return part;
}

// Returns the rows of all processes, which have the same parts before them and so throw together.
double check_parts(const at::Tensor& input, const at::Tensor& parts, c10::string_view layer) {
  const int64_t width = kFirst + 2 * input.size(1);
  TORCH_CHECK(
      parts.dim() == 2 && parts.size(0) > 0 && parts.size(1) == width && parts.scalar_type() == at::kDouble,
      "parts should be of scalar type Double and shape [processes, ", width, "] not ", parts.scalar_type(), " ",
      parts.sizes());
  const auto* data = parts.const_data_ptr<double>();
  double rows = 0.0;
  for (int64_t p = 0; p < parts.size(0); ++p) {
    TORCH_CHECK(
        data[p * width + kMark] == data[kMark], name_of(layer), ": the processes of ranks 0 and ", p,
        " of its group are at different layers, or differ in channels, dtype, momentum, eps or whether the "
        "input needs a gradient, or one is in its forward and one in its backward. "
        "TORCH_BN_SYNC_DEBUG=1 tells more.");
    rows += data[p * width + kCount];
  }
  return rows;
}

void check_more_than_one_row(const at::Tensor& input, const at::Tensor& parts, double rows) {
  TORCH_CHECK_VALUE(rows != 1.0, "Expected more than 1 value per channel when training, got 1 in all ",
                    parts.size(0), " processes together, here input size torch.Size(", input.sizes(), ")");
}

OutputAndStats normalise_cpu(const at::Tensor& input, const at::Tensor& parts,
                             const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                             const std::optional<at::Tensor>& running_mean,
                             const std::optional<at::Tensor>& running_var,
                             const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                             double eps, c10::string_view layer, int64_t relu) {
  check_relu(relu);
  check_forward_but_rows(input, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true,
                         eps);
  const at::Tensor kept_parts = parts.contiguous();
  const double rows = check_parts(input, kept_parts, layer);
  check_more_than_one_row(input, kept_parts, rows);
  const auto& kernels = sync_kernels();
  at::Tensor output = empty_result(input.sizes(), input.scalar_type());
  ForwardCall call(input, weight, bias, running_mean, running_var, /*training=*/true, eps, relu);
  auto& args = call.args;
  const int64_t channels = args.shape.c;
  at::Tensor stats = at::zeros({2 * channels + 1}, input.options().dtype(at::kDouble));
  args.output = output.mutable_data_ptr();
  args.mean = stats.mutable_data_ptr<double>();
  args.invstd = args.mean + channels;
  args.mean[2 * channels] = rows;
  args.momentum = count_batch(num_batches_tracked, momentum);
  if (rows == 0.0 || channels == 0) return {std::move(output), std::move(stats)};
  const auto* data = kept_parts.const_data_ptr<double>();
  kernels.normalise(args, kernels::Parts{kept_parts.size(0), kept_parts.size(1), data + kCount, data + kFirst,
                                         data + kFirst + channels});
  return {std::move(output), std::move(stats)};
}

void check_gradient(const at::Tensor& grad_output, const at::Tensor& input,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& stats, int64_t relu) {
  const int64_t channels = input.size(1);
  TORCH_CHECK(stats.dim() == 1 && stats.size(0) == 2 * channels + 1, "stats should contain ", 2 * channels + 1,
              " elements not ", stats.numel());
  check_backward(grad_output, input, weight, stats.narrow(0, 0, 2 * channels).view({2, channels}), bias, relu);
}

at::Tensor gradient_sums_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                             const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                             const at::Tensor& stats, int64_t mark, int64_t relu) {
  check_gradient(grad_output, input, weight, bias, stats, relu);
  at::Tensor part = new_part(input, mark);
  if (input.numel() == 0) return part;
  const BackwardCall call(grad_output, input, weight, bias, stats, /*training=*/true, relu);
  auto* values = part.mutable_data_ptr<double>() + kFirst;
  sync_kernels().sums(call.args, values, values + call.args.shape.c);
  return part;
}

at::Tensor gradient_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                        const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& stats, const at::Tensor& parts, c10::string_view layer, int64_t relu) {
  const at::Tensor kept_parts = parts.contiguous();
  check_gradient(grad_output, input, weight, bias, stats, relu);
  const double rows = check_parts(input, kept_parts, layer);
  at::Tensor grad_input = empty_result(input.sizes(), input.scalar_type());
  if (input.numel() == 0) return grad_input;
  BackwardCall call(grad_output, input, weight, bias, stats, /*training=*/true, relu);
  call.args.grad_input = grad_input.mutable_data_ptr();
  const auto* values = kept_parts.const_data_ptr<double>() + kFirst;
  sync_kernels().gradient(call.args, kernels::PartialSums{kept_parts.size(0), kept_parts.size(1), rows, values,
                                                          values + call.args.shape.c});
  return grad_input;
}

TORCH_LIBRARY_IMPL(torch_bn, CPU, m) {
  m.impl("_sync_moments", moments_cpu);
  m.impl("_sync_normalise", normalise_cpu);
  m.impl("_sync_gradient_sums", gradient_sums_cpu);
  m.impl("_sync_gradient", gradient_cpu);
}

}  // namespace
}  // namespace torch_bn::ops::sync
