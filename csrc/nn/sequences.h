// The layer with its own options: chunks of the batch, channels as the last dimension, padded steps left out.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace torch_bn::nn {

// What a layer brings to a call; any tensor may be undefined.
struct Layer {
  torch::Tensor weight;
  torch::Tensor bias;
  torch::Tensor running_mean;
  torch::Tensor running_var;
  torch::Tensor num_batches_tracked;
  bool by_batch;  // whether the batch's own statistics normalise it
  std::optional<double> momentum;
  double eps;
  std::optional<int64_t> virtual_batch_size;
  bool channels_last;
};

// Of (N, C), (N, C, L), or with channels_last (N, L, C).
torch::Tensor sequences(const torch::Tensor& input, const Layer& layer);

// Of sequences of which only some steps count: `steps` is a bool tensor (N, L) of which, or an integer tensor (N)
// of how many. Refusals leave the statistics as they were.
torch::Tensor masked_sequences(const torch::Tensor& input, const torch::Tensor& steps, const Layer& layer);

}  // namespace torch_bn::nn
