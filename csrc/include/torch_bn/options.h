/// \file
/// The options of the modules and of the functional form.
#pragma once

#include <torch/arg.h>
#include <torch/nn/options/batchnorm.h>
#include <torch/types.h>

#include <cstdint>
#include <optional>

namespace torch_bn {

/// Options of `BatchNorm1d`: those of `torch::nn::BatchNorm1d`, and some of ours behind them. Each is set by a
/// method of its name that takes the value, and read by the same method without one.
///
/// ```cpp
/// torch_bn::BatchNorm1d layer(torch_bn::BatchNorm1dOptions(300).eps(1e-3).momentum(std::nullopt));
/// assert(layer->options.eps() == 1e-3);
/// ```
struct BatchNorm1dOptions {
  /// \param num_features number of channels C of the input
  BatchNorm1dOptions(int64_t num_features);  // NOLINT(google-explicit-constructor): as in torch

  /// The same options with a bias where there is a weight.
  BatchNorm1dOptions(const torch::nn::BatchNorm1dOptions& options);  // NOLINT(google-explicit-constructor)

  /// Number of channels C of the input. Read when a module is made or reset.
  TORCH_ARG(int64_t, num_features);

  /// Added to the variance; positive in training.
  TORCH_ARG(double, eps) = 1e-5;

  /// Share of each batch in the running statistics, or `std::nullopt` for the average of all batches.
  TORCH_ARG(std::optional<double>, momentum) = 0.1;

  /// Whether there are a learnable weight and bias. Read when a module is made or reset.
  TORCH_ARG(bool, affine) = true;

  /// Whether there is a learnable bias, if `affine`. Read when a module is made or reset.
  TORCH_ARG(bool, bias) = true;

  /// Whether running statistics are kept, and used in evaluation.
  TORCH_ARG(bool, track_running_stats) = true;

  /// Rows of a chunk of ghost batch norm, or `std::nullopt` for the whole batch. In training, chunks of so many
  /// consecutive rows (of dimension 0) are normalised each by its own statistics, and move the running statistics
  /// one after the other. The last chunk may be shorter; a last row of a single value per channel joins the chunk
  /// before.
  TORCH_ARG(std::optional<int64_t>, virtual_batch_size) = std::nullopt;

  /// Whether sequences are (N, L, C) and not (N, C, L).
  TORCH_ARG(bool, channels_last) = false;
};

namespace functional {

/// Options of `functional::batch_norm`: those of `torch::nn::functional::batch_norm`.
///
/// ```cpp
/// auto options = torch_bn::functional::BatchNormFuncOptions().weight(torch::ones(3)).training(true);
/// assert(options.training() && !options.bias().defined());
/// ```
struct BatchNormFuncOptions {
  BatchNormFuncOptions() = default;

  /// The same options.
  BatchNormFuncOptions(  // NOLINT(google-explicit-constructor)
      const torch::nn::functional::BatchNormFuncOptions& options);

  /// (C), or undefined for ones.
  TORCH_ARG(torch::Tensor, weight);

  /// (C), or undefined for zeros.
  TORCH_ARG(torch::Tensor, bias);

  /// Whether the batch's own statistics normalise it.
  TORCH_ARG(bool, training) = false;

  /// Share of the batch in the updated running statistics.
  TORCH_ARG(double, momentum) = 0.1;

  /// Added to the variance; positive in training.
  TORCH_ARG(double, eps) = 1e-5;
};

}  // namespace functional
}  // namespace torch_bn
