/// \file
/// The layers, as module holders like those of torch::nn.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/types.h>
#include <torch_bn/options.h>

#include <ostream>

namespace torch_bn {
namespace detail {

/// What all batch norm layers are made of: their options, parameters, buffers and how these are reset and printed.
/// `Derived` adds `forward` and `layer_name`.
template <typename Derived>
class BatchNormImplBase : public torch::nn::Cloneable<Derived> {
 public:
  /// \param options see `BatchNorm1dOptions`
  /// \throws c10::Error for a negative number of features
  explicit BatchNormImplBase(const BatchNorm1dOptions& options);

  /// Makes parameters and buffers from the options, with their initial values. The constructor and `clone` have
  /// called it; as in torch's layer, a further call throws.
  void reset() override;

  /// Sets the weight to ones and the bias to zeros, and resets the running statistics.
  void reset_parameters();

  /// Sets the running mean to zeros, the running variance to ones and the counter to zero.
  void reset_running_stats();

  /// Writes one line with the layer's name and options.
  void pretty_print(std::ostream& stream) const override;

  /// The options this module was made with. A new eps or momentum takes effect at the next forward.
  BatchNorm1dOptions options;

  torch::Tensor weight;        ///< (C), defined if `affine`
  torch::Tensor bias;          ///< (C), defined if `affine` and `bias`
  torch::Tensor running_mean;  ///< (C), defined if `track_running_stats`
  torch::Tensor running_var;   ///< (C), unbiased, defined if `track_running_stats`
  /// Without dimensions, int64 until `Module::to(dtype)` converts it; defined if `track_running_stats`: the
  /// batches, or with `virtual_batch_size` the chunks, seen in training.
  torch::Tensor num_batches_tracked;
};

}  // namespace detail

/// Batch normalisation over an (N, C) or (N, C, L) input, in place of `torch::nn::BatchNorm1d`.
///
/// Parameters, buffers and files written by `torch::save` are those of torch's layer, the arithmetic is this
/// library's: right to a few roundings of the result whatever the mean of the data, and with the same bits on
/// every number of threads. Many threads may call `forward` of one module at once in evaluation; in training each
/// needs its own, as the running statistics are written to.
class BatchNorm1dImpl : public detail::BatchNormImplBase<BatchNorm1dImpl> {
 public:
  using detail::BatchNormImplBase<BatchNorm1dImpl>::BatchNormImplBase;

  /// Normalises `input`; in training, also updates the running statistics and their counter.
  ///
  /// \param input (N, C) or (N, C, L), with `channels_last` (N, C) or (N, L, C); float32, float64, bfloat16 or
  ///   float16, of any strides. Other devices and layouts are served by torch's own implementation.
  /// \return a contiguous tensor of the input's shape and type
  /// \throws c10::Error with the words of `torch::nn::BatchNorm1d`, if the input is neither 2D nor 3D, if there is
  ///   one value per channel in training, or if a size or type does not fit; then no buffer has changed
  torch::Tensor forward(const torch::Tensor& input);

  /// The same of padded sequences: steps that do not count are left out of the statistics, whatever they hold.
  /// They are zero in the result, and get no gradient.
  ///
  /// ```cpp
  /// torch_bn::BatchNorm1d layer(torch_bn::BatchNorm1dOptions(64).channels_last(true));
  /// auto y = layer->forward_masked(torch::randn({3, 7, 64}), torch::tensor({7, 3, 5}));
  /// assert(y[1].slice(0, 3).count_nonzero().item<int64_t>() == 0);
  /// ```
  ///
  /// \param input (N, C, L), with `channels_last` (N, L, C); float32, float64, bfloat16 or float16, of any strides
  /// \param steps how many steps count in each sequence, an integer tensor (N) of values in [0, L]; or which steps
  ///   count, a bool tensor (N, L)
  /// \return a contiguous tensor of the input's shape and type
  /// \throws c10::Error also if `steps` does not fit the input, or fewer than two steps count in training
  torch::Tensor forward_masked(const torch::Tensor& input, const torch::Tensor& steps);

  /// "BatchNorm1d".
  static const char* layer_name();
};

extern template class detail::BatchNormImplBase<BatchNorm1dImpl>;

/// Holds a `BatchNorm1dImpl`, as `torch::nn::BatchNorm1d` holds its own.
///
/// ```cpp
/// torch_bn::BatchNorm1d layer(1);
/// auto y = layer(torch::tensor({{9.0f}, {10.0f}, {11.0f}}));  // -1.2247, 0, 1.2247
/// assert(layer->running_mean.item<float>() == 1);
/// ```
TORCH_MODULE(BatchNorm1d);

/// Batch normalisation and then a ReLU, as one operation: relu(bn(x)).
///
/// Options, parameters, buffers and files are those of `BatchNorm1d`. Forward and backward make no more sweeps
/// over memory than the batch norm alone, and only the input is kept for the backward, which computes the ReLU's
/// mask again. Values, gradients and the treatment of NaN and zero are those of the two modules of torch.
class BatchNormReLU1dImpl : public detail::BatchNormImplBase<BatchNormReLU1dImpl> {
 public:
  using detail::BatchNormImplBase<BatchNormReLU1dImpl>::BatchNormImplBase;

  /// As `BatchNorm1dImpl::forward`, followed by a ReLU.
  torch::Tensor forward(const torch::Tensor& input);

  /// "BatchNormReLU1d".
  static const char* layer_name();
};

/// A ReLU and then batch normalisation, as one operation: bn(relu(x)); otherwise like `BatchNormReLU1dImpl`. The
/// statistics are those of relu(x).
class ReLUBatchNorm1dImpl : public detail::BatchNormImplBase<ReLUBatchNorm1dImpl> {
 public:
  using detail::BatchNormImplBase<ReLUBatchNorm1dImpl>::BatchNormImplBase;

  /// As `BatchNorm1dImpl::forward` of relu(input).
  torch::Tensor forward(const torch::Tensor& input);

  /// "ReLUBatchNorm1d".
  static const char* layer_name();
};

extern template class detail::BatchNormImplBase<BatchNormReLU1dImpl>;
extern template class detail::BatchNormImplBase<ReLUBatchNorm1dImpl>;

/// Holds a `BatchNormReLU1dImpl`.
///
/// ```cpp
/// torch_bn::BatchNormReLU1d layer(300);
/// auto y = layer(torch::randn({64, 300}));
/// assert(y.min().item<float>() == 0);
/// ```
TORCH_MODULE(BatchNormReLU1d);

/// Holds a `ReLUBatchNorm1dImpl`.
///
/// ```cpp
/// torch_bn::ReLUBatchNorm1d layer(1);
/// auto y = layer(torch::tensor({{-4.0f}, {1.0f}, {2.0f}}));  // -1.2247, 0, 1.2247
/// assert(y[1].item<float>() == 0);
/// ```
TORCH_MODULE(ReLUBatchNorm1d);

}  // namespace torch_bn
