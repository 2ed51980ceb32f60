// Ghost batch norm on CPU: the kernels, chunk by chunk. Chunks are independent of each other but for the running
// statistics, which are moved afterwards, in the chunks' order.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>

#include "../kernels/team.h"
#include "ghost.h"
#include "kernel_args.h"
#include "memory.h"

namespace torch_bn::ops {
namespace {

using Doubles = std::unique_ptr<double[]>;

// Which threads take what: each takes chunks of its own, or all of them share every chunk. It changes no bit.
struct Sharing {
  int over_chunks;
  int inside_chunks;

  Sharing(const Chunks& chunks, int64_t elements) {
    const int threads = thread_count();
    const bool apart = chunks.count() >= 4 * threads || elements / chunks.count() < kernels::kSerialBelow;
    over_chunks = apart ? threads : 1;
    inside_chunks = apart ? 1 : threads;
  }
};

// Calls body(chunk, working memory) for every chunk.
template <typename Body>
void for_each_chunk(const Chunks& chunks, const Sharing& sharing, int64_t elements, std::size_t memory,
                    Body body) {
  const auto slots = static_cast<std::size_t>(sharing.over_chunks);
  const auto working = std::make_unique_for_overwrite<double[]>(slots * memory);
  kernels::run_team(sharing.over_chunks, elements, [&](const kernels::Team& team) {
    double* own = working.get() + static_cast<std::size_t>(team.share(sharing.over_chunks).begin) * memory;
    const auto share = team.share(chunks.count());
    for (int64_t i = share.begin; i < share.end; ++i) body(i, own);
  });
}

// The largest of what the chunks need: all are of one shape, but for the last.
template <typename Need>
std::size_t memory_for(const Chunks& chunks, kernels::Shape shape, Need need) {
  std::size_t most = 0;
  for (const int64_t i : {int64_t{0}, chunks.count() - 1}) {
    shape.n = chunks.size(i);
    most = std::max(most, need(shape));
  }
  return most;
}

ArrayView chunk_of(ArrayView batch, int64_t row, int64_t element_size) {
  batch.data = static_cast<const char*>(batch.data) + row * batch.stride_n * element_size;
  return batch;
}

char* row_of(void* contiguous, const kernels::Shape& shape, int64_t row, int64_t element_size) {
  return static_cast<char*>(contiguous) + row * shape.c * shape.l * element_size;
}

// To the bit what a kernel makes of the running statistics of one batch (csrc/kernels/forward.h).
template <typename Param>
void move_running(const ChannelView& running, int64_t channels, double momentum, const double* statistic,
                  double divisor) {
  using Real = at::opmath_type<Param>;
  auto* data = static_cast<Param*>(running.data);
  const double keep = 1.0 - momentum;
  for (int64_t c = 0; c < channels && data != nullptr; ++c) {
    Param& value = data[c * running.stride];
    const double old = static_cast<Real>(value);
    value = static_cast<Param>(static_cast<Real>(keep * old + momentum * (statistic[c] / divisor)));
  }
}

OutputAndStats forward_cpu(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                           const std::optional<at::Tensor>& running_var,
                           const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                           double eps, int64_t virtual_batch_size) {
  check_ghost_forward(input, weight, bias, running_mean, running_var, num_batches_tracked, eps,
                      virtual_batch_size);
  const auto& table = active_kernels();
  const Chunks chunks(input, virtual_batch_size);
  const int64_t elements = input.numel();
  const Sharing sharing(chunks, elements);
  const auto param_type = parameter_dtype(input, running_mean, bias, weight);
  kernels::ForwardArgs batch{};
  batch.shape = shape_of(input);
  batch.dtype = kernel_dtype(input.scalar_type());
  batch.param_dtype = kernel_dtype(param_type);
  batch.training = true;
  batch.eps = eps;
  const int64_t channels = batch.shape.c;

  at::Tensor output = empty_result(input.sizes(), input.scalar_type());
  const int64_t slots = ghost_slots(input, virtual_batch_size).expect_int();
  at::Tensor stats = empty_result({slots, 2, channels}, at::kDouble);
  if (slots > chunks.count() || elements == 0) stats.zero_();
  const bool moves = is_given(running_mean) && elements > 0;
  Doubles m2;  // of every chunk, for the running variance
  if (moves) m2 = std::make_unique_for_overwrite<double[]>(static_cast<std::size_t>(chunks.count() * channels));
  at::Tensor weight_kept;
  at::Tensor bias_kept;
  batch.input = view_of(input);
  batch.output = output.mutable_data_ptr();
  batch.weight = parameter_view(weight, weight_kept);
  batch.bias = parameter_view(bias, bias_kept);
  auto* statistics = stats.mutable_data_ptr<double>();
  batch.threads = sharing.inside_chunks;
  batch.stream_from = kernels::stream_from();

  if (elements > 0) {
    const auto memory = memory_for(chunks, batch.shape, kernels::forward_scratch);
    for_each_chunk(chunks, sharing, elements, memory, [&](int64_t i, double* scratch) {
      kernels::ForwardArgs args = batch;
      args.shape.n = chunks.size(i);
      args.input = chunk_of(batch.input, chunks.begin(i), input.element_size());
      args.output = row_of(batch.output, batch.shape, chunks.begin(i), input.element_size());
      args.mean = statistics + 2 * i * channels;
      args.invstd = args.mean + channels;
      args.scratch = scratch;
      table.forward(args);
      if (moves) std::copy_n(scratch + channels, channels, m2.get() + i * channels);
    });
  }

  // Nothing below this line can fail, so a refused call has changed nothing.
  const ChannelView mean = statistics_view(running_mean, /*written=*/true);
  const ChannelView var = statistics_view(running_var, /*written=*/true);
  for (int64_t i = 0; i < chunks.count(); ++i) {
    const double factor = count_batch(num_batches_tracked, momentum);
    if (!moves) continue;
    const double rest = static_cast<double>(chunks.size(i) * batch.shape.l) - 1.0;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, param_type, "ghost_batch_norm", [&] {
      move_running<scalar_t>(mean, channels, factor, statistics + 2 * i * channels, 1.0);
      move_running<scalar_t>(var, channels, factor, m2.get() + i * channels, rest);
    });
  }
  return {std::move(output), std::move(stats)};
}

Gradients backward_cpu(const at::Tensor& grad_output, const at::Tensor& input,
                       const std::optional<at::Tensor>& weight, const at::Tensor& stats, double /*eps*/,
                       int64_t virtual_batch_size, OutputMask output_mask) {
  check_ghost_backward(grad_output, input, weight, stats, virtual_batch_size);
  const auto& table = active_kernels();
  const Chunks chunks(input, virtual_batch_size);
  const int64_t elements = input.numel();
  const Sharing sharing(chunks, elements);
  const auto param_type = parameter_dtype(input, weight);
  kernels::BackwardArgs batch{};
  batch.shape = shape_of(input);
  batch.dtype = kernel_dtype(input.scalar_type());
  batch.param_dtype = kernel_dtype(param_type);
  batch.training = true;
  batch.grad_output = view_of(grad_output);
  batch.input = view_of(input);
  at::Tensor weight_kept;
  batch.weight = parameter_view(weight, weight_kept);
  const at::Tensor stats_kept = stats.contiguous();
  const auto* statistics = stats_kept.const_data_ptr<double>();
  batch.threads = sharing.inside_chunks;
  batch.stream_from = kernels::stream_from();
  const int64_t channels = batch.shape.c;

  at::Tensor grad_input;
  if (output_mask[0]) grad_input = empty_result(input.sizes(), input.scalar_type());
  batch.grad_input = output_mask[0] && elements > 0 ? grad_input.mutable_data_ptr() : nullptr;
  const bool sums = output_mask[1] || output_mask[2];
  // Of every chunk the sums of grad_output and of grad_output * (input - mean), as a kernel leaves them first in
  // its scratch: in double, not rounded to the parameters' type.
  Doubles totals;
  if (sums)
    totals = std::make_unique_for_overwrite<double[]>(static_cast<std::size_t>(2 * chunks.count() * channels));
  if (elements > 0 && (sums || output_mask[0])) {
    // A kernel makes sums only for a result: here one that is thrown away.
    const auto unused = static_cast<std::size_t>(channels);
    const auto memory = memory_for(chunks, batch.shape, kernels::backward_scratch) + unused;
    for_each_chunk(chunks, sharing, elements, memory, [&](int64_t i, double* working) {
      kernels::BackwardArgs args = batch;
      args.shape.n = chunks.size(i);
      args.grad_output = chunk_of(batch.grad_output, chunks.begin(i), input.element_size());
      args.input = chunk_of(batch.input, chunks.begin(i), input.element_size());
      args.mean = statistics + 2 * i * channels;
      args.invstd = args.mean + channels;
      if (batch.grad_input != nullptr)
        args.grad_input = row_of(batch.grad_input, batch.shape, chunks.begin(i), input.element_size());
      args.grad_bias = sums ? working : nullptr;
      args.scratch = working + unused;
      table.backward(args);
      if (sums) std::copy_n(args.scratch, 2 * channels, totals.get() + 2 * i * channels);
    });
  }

  // The parameters' gradients are summed over the chunks in their order, in double, and rounded once.
  auto summed = [&](bool wanted, auto term) {
    if (!wanted) return at::Tensor();
    at::Tensor sum = at::zeros({channels}, input.options().dtype(at::kDouble));
    auto* values = sum.mutable_data_ptr<double>();
    for (int64_t i = 0; elements > 0 && i < chunks.count(); ++i)
      for (int64_t c = 0; c < channels; ++c) values[c] += term(i, c);
    return sum.to(param_type);
  };
  at::Tensor grad_weight = summed(output_mask[1], [&](int64_t i, int64_t c) {
    return totals[(2 * i + 1) * channels + c] * statistics[(2 * i + 1) * channels + c];
  });
  at::Tensor grad_bias =
      summed(output_mask[2], [&](int64_t i, int64_t c) { return totals[2 * i * channels + c]; });
  return {std::move(grad_input), std::move(grad_weight), std::move(grad_bias)};
}

TORCH_LIBRARY_IMPL(torch_bn, CPU, m) {
  m.impl("_ghost_batch_norm_forward", forward_cpu);
  m.impl("_ghost_batch_norm_backward", backward_cpu);
}

}  // namespace
}  // namespace torch_bn::ops
