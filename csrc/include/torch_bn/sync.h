/// \file
/// The layers whose batch lies in several processes.
#pragma once

#include <torch_bn/modules.h>

#include <string>
#include <utility>

namespace torch_bn {

namespace detail {

/// What the layers of several processes are made of. `Derived` adds `layer_name` and where its ReLU is.
template <typename Derived>
class SyncBatchNormImplBase : public BatchNormImplBase<Derived> {
 public:
  /// \param options those of `BatchNorm1d` but virtual_batch_size and channels_last, which forward refuses
  /// \param group name under which `c10d::register_process_group` knows the group; empty for a layer alone, which
  ///   is the layer of one process
  /// \param name the layer as messages name it, and by which the processes tell their layers apart: the same in
  ///   all
  explicit SyncBatchNormImplBase(const BatchNorm1dOptions& options, std::string group = "", std::string name = "")
      : BatchNormImplBase<Derived>(options), group_(std::move(group)), name_(std::move(name)) {}

  /// Normalises `input`; in training by the statistics of all processes, and updates the running statistics.
  ///
  /// \param input (N, C) or (N, C, L) on CPU; float32, float64, bfloat16 or float16, of any strides; N may be 0
  /// \return a contiguous tensor of the input's shape and type
  /// \throws c10::Error as `BatchNorm1d`; when there is no group of that name, when the processes do not do the
  ///   same, or when a process has ended or does not come within the group's timeout
  torch::Tensor forward(const torch::Tensor& input);

  /// As in every layer; the next forward, a copy's first one, makes sure that all processes mean the same.
  void reset() override;

 private:
  std::string group_;
  std::string name_;
  bool agreed_ = false;
};

}  // namespace detail

/// A `BatchNorm1d` whose statistics are those of the batches of all processes of a group together.
///
/// In training, a forward and a backward exchange a few numbers per channel, in one collective each, and all
/// processes hold the same statistics to the bit. Local batches may differ in size and be empty. Evaluation does
/// not communicate. Weight and bias get the gradients of the local rows, to be averaged over the processes. There
/// is no second derivative.
///
/// The first forward in training makes sure that all processes mean the same, and throws in all of them if not;
/// with the environment variable TORCH_BN_SYNC_DEBUG=1 every forward does.
class SyncBatchNorm1dImpl : public detail::SyncBatchNormImplBase<SyncBatchNorm1dImpl> {
 public:
  using detail::SyncBatchNormImplBase<SyncBatchNorm1dImpl>::SyncBatchNormImplBase;

  /// "SyncBatchNorm1d".
  static const char* layer_name();
};

/// A `BatchNormReLU1d` of several processes; otherwise like `SyncBatchNorm1dImpl`.
class SyncBatchNormReLU1dImpl : public detail::SyncBatchNormImplBase<SyncBatchNormReLU1dImpl> {
 public:
  using detail::SyncBatchNormImplBase<SyncBatchNormReLU1dImpl>::SyncBatchNormImplBase;

  /// "SyncBatchNormReLU1d".
  static const char* layer_name();
};

/// A `ReLUBatchNorm1d` of several processes; otherwise like `SyncBatchNorm1dImpl`.
class SyncReLUBatchNorm1dImpl : public detail::SyncBatchNormImplBase<SyncReLUBatchNorm1dImpl> {
 public:
  using detail::SyncBatchNormImplBase<SyncReLUBatchNorm1dImpl>::SyncBatchNormImplBase;

  /// "SyncReLUBatchNorm1d".
  static const char* layer_name();
};

extern template class detail::BatchNormImplBase<SyncBatchNorm1dImpl>;
extern template class detail::BatchNormImplBase<SyncBatchNormReLU1dImpl>;
extern template class detail::BatchNormImplBase<SyncReLUBatchNorm1dImpl>;
extern template class detail::SyncBatchNormImplBase<SyncBatchNorm1dImpl>;
extern template class detail::SyncBatchNormImplBase<SyncBatchNormReLU1dImpl>;
extern template class detail::SyncBatchNormImplBase<SyncReLUBatchNorm1dImpl>;

/// Holds a `SyncBatchNorm1dImpl`.
///
/// ```cpp
/// // Before its forward: c10d::register_process_group("sync", group).
/// torch_bn::SyncBatchNorm1d layer(300, "sync", "bn1");
/// torch_bn::SyncBatchNorm1d alone(300);
/// auto y = alone(torch::randn({64, 300}));
/// assert(alone->num_batches_tracked.item<int64_t>() == 1);
/// ```
TORCH_MODULE(SyncBatchNorm1d);

/// Holds a `SyncBatchNormReLU1dImpl`.
///
/// ```cpp
/// torch_bn::SyncBatchNormReLU1d alone(300);
/// assert(alone(torch::randn({64, 300})).min().item<float>() == 0);
/// ```
TORCH_MODULE(SyncBatchNormReLU1d);

/// Holds a `SyncReLUBatchNorm1dImpl`.
///
/// ```cpp
/// torch_bn::SyncReLUBatchNorm1d alone(1);
/// assert(alone(torch::tensor({{-4.0f}, {1.0f}, {2.0f}}))[1].item<float>() == 0);
/// ```
TORCH_MODULE(SyncReLUBatchNorm1d);

}  // namespace torch_bn
