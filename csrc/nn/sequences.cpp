#include "sequences.h"

#include <torch/torch.h>

#include <algorithm>
#include <vector>

#include "../ops/ghost.h"
#include "serve.h"

namespace torch_bn::nn {
namespace {

using ops::Chunks;

at::Tensor ordinary(const at::Tensor& input, const Layer& layer) {
  return batch_norm(ops::Relu::none, input, layer.weight, layer.bias, layer.running_mean, layer.running_var,
                    layer.num_batches_tracked, layer.by_batch, layer.momentum, layer.eps);
}

at::Tensor in_chunks(const at::Tensor& input, const Layer& layer, std::optional<int64_t> virtual_batch_size) {
  if (!virtual_batch_size) return ordinary(input, layer);
  const at::Tensor& counter = layer.num_batches_tracked;
  if (!counter.defined() || counter.scalar_type() == at::kLong)
    return ops::ghost_batch_norm(input, ops::optional_of(layer.weight), ops::optional_of(layer.bias),
                                 ops::optional_of(layer.running_mean), ops::optional_of(layer.running_var),
                                 ops::optional_of(counter), layer.by_batch, layer.momentum, layer.eps,
                                 *virtual_batch_size);
  // Module::to(dtype) in C++ converts the counter too.
  const Chunks chunks(input, *virtual_batch_size);
  std::vector<at::Tensor> results;
  for (int64_t i = 0; i < chunks.count(); ++i) results.push_back(ordinary(chunks.of(input, i), layer));
  return torch::cat(results);
}

constexpr const char* kSingle = "Expected more than 1 value per channel when training, got input size ";

// The steps that count of an (N, L) of them, as a bool tensor.
at::Tensor mask_of(const at::Tensor& steps, int64_t rows, int64_t length) {
  if (steps.scalar_type() == at::kBool) {
    TORCH_CHECK_VALUE(steps.sizes() == at::IntArrayRef({rows, length}),
                      "mask should have the input's size (N, L) = (", rows, ", ", length, "), but got ",
                      steps.sizes());
    return steps;
  }
  TORCH_CHECK_TYPE(at::isIntegralType(steps.scalar_type(), /*includeBool=*/false) ||
                       at::isBarebonesUnsignedType(steps.scalar_type()),
                   "lengths should be an integer tensor, but got ", steps.scalar_type());
  TORCH_CHECK_VALUE(steps.sizes() == at::IntArrayRef({rows}), "lengths should have the input's size (N) = (", rows,
                    "), but got ", steps.sizes());
  const at::Tensor lengths = steps.to(at::kLong);  // the wider unsigned types have no comparisons
  TORCH_CHECK_VALUE(((lengths >= 0) & (lengths <= length)).all().item<bool>(),
                    "lengths should be in [0, L] = [0, ", length, "]");
  return torch::arange(length, steps.device()) < lengths.unsqueeze(1);
}

// The steps that count of so many sequences each; fewer than two of the last chunk join the chunk before.
std::vector<at::Tensor> chunks_of(const at::Tensor& packed, const at::Tensor& mask, int64_t virtual_batch_size) {
  std::vector<int64_t> counts;
  for (const at::Tensor& part : mask.split(virtual_batch_size)) counts.push_back(part.sum().item<int64_t>());
  if (counts.size() > 1 && counts.back() < 2) {
    const int64_t last = counts.back();
    counts.pop_back();
    counts.back() += last;
  }
  return packed.split_with_sizes(counts);
}

void check_size(const std::optional<int64_t>& virtual_batch_size) {
  TORCH_CHECK_VALUE(!virtual_batch_size || *virtual_batch_size >= 1,
                    "virtual_batch_size should be positive, but got ", virtual_batch_size.value_or(0));
}

}  // namespace

at::Tensor sequences(const at::Tensor& input, const Layer& layer) {
  check_size(layer.virtual_batch_size);
  if (!layer.channels_last || input.dim() == 2) return in_chunks(input, layer, layer.virtual_batch_size);
  const int64_t rows = input.size(0);
  const int64_t length = input.size(1);
  TORCH_CHECK_VALUE(!(layer.by_batch && rows * length == 1), kSingle, input.sizes());
  // A matrix of steps without a copy, as of contiguous sequences and of slices of their channels.
  if (length > 0 && (input.is_contiguous() || input.stride(0) == length * input.stride(1))) {
    auto of_steps = layer.virtual_batch_size;
    if (of_steps) of_steps = std::min(*of_steps, std::max<int64_t>(rows, 1)) * length;
    return in_chunks(input.flatten(0, 1), layer, of_steps).view(input.sizes());
  }
  // The kernels read any strides in place; what they wrote is put in order.
  return in_chunks(input.transpose(1, 2), layer, layer.virtual_batch_size).transpose(1, 2).contiguous();
}

at::Tensor masked_sequences(const at::Tensor& input, const at::Tensor& steps, const Layer& layer) {
  check_size(layer.virtual_batch_size);
  TORCH_CHECK_VALUE(input.dim() == 3, "expected 3D input with lengths or mask (got ", input.dim(), "D input)");
  const at::Tensor by_steps = layer.channels_last ? input : input.transpose(1, 2);  // (N, L, C)
  const at::Tensor mask = mask_of(steps, by_steps.size(0), by_steps.size(1));
  const at::Tensor index = mask.flatten().nonzero().squeeze(1);
  const at::Tensor packed = by_steps.flatten(0, 1).index_select(0, index);
  std::vector<at::Tensor> pieces = {packed};
  if (layer.virtual_batch_size) pieces = chunks_of(packed, mask, *layer.virtual_batch_size);
  for (at::Tensor& piece : pieces) TORCH_CHECK_VALUE(!layer.by_batch || piece.size(0) > 1, kSingle, piece.sizes());
  std::vector<at::Tensor> results;
  for (const at::Tensor& piece : pieces) results.push_back(ordinary(piece, layer));
  const at::Tensor result = results.size() == 1 ? results[0] : torch::cat(results);
  const at::Tensor spread =
      result.new_zeros({mask.numel(), result.size(1)}).index_add_(0, index, result).view(by_steps.sizes());
  return layer.channels_last ? spread : spread.transpose(1, 2).contiguous();
}

}  // namespace torch_bn::nn
