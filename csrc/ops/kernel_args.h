// What the CPU kernels' arguments are made of: raw pointers and strides from tensors, working memory, threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <stdexcept>

#include "../kernels/dispatch.h"
#include "ops.h"

namespace torch_bn::ops {

using kernels::ArrayView;
using kernels::ChannelView;

inline const kernels::KernelTable& active_kernels() {
  try {
    return kernels::active();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
}

inline kernels::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return kernels::DType::f32;
    case at::kDouble:
      return kernels::DType::f64;
    case at::kBFloat16:
      return kernels::DType::bf16;
    case at::kHalf:
      return kernels::DType::f16;
    default:  // GCOVR_EXCL_START: check_dtypes has refused the others
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"batch_norm\" not implemented for '", dtype, "'");
  }  // GCOVR_EXCL_STOP
}

inline kernels::Shape shape_of(const at::Tensor& input) {
  return {input.size(0), input.size(1), input.dim() == 3 ? input.size(2) : 1};
}

inline ArrayView view_of(const at::Tensor& array) {
  const bool has_length = array.dim() == 3;
  return {array.const_data_ptr(), array.stride(0), array.stride(1), has_length ? array.stride(2) : 0};
}

// A parameter of any shape with the right number of elements, flattened; `keep` owns a copy where one is due.
inline ChannelView parameter_view(const std::optional<at::Tensor>& parameter, at::Tensor& keep) {
  if (!is_given(parameter)) return {nullptr, 0};
  if (parameter->dim() != 1) keep = parameter->reshape(-1);
  const at::Tensor& flat = keep.defined() ? keep : *parameter;
  return {const_cast<void*>(flat.const_data_ptr()), flat.stride(0)};
}

inline ChannelView statistics_view(const std::optional<at::Tensor>& statistics, bool written) {
  if (!is_given(statistics)) return {nullptr, 0};
  void* data = written ? statistics->mutable_data_ptr() : const_cast<void*>(statistics->const_data_ptr());
  return {data, statistics->stride(0)};
}

// Working memory of one call. Small layers find it on the stack.
class Scratch {
 public:
  explicit Scratch(std::size_t doubles) {
    if (doubles > kOnStack) heap_ = std::make_unique_for_overwrite<double[]>(doubles);
  }
  double* data() { return heap_ ? heap_.get() : stack_; }

 private:
  static constexpr std::size_t kOnStack = 2048;
  std::unique_ptr<double[]> heap_;
  double stack_[kOnStack];  // NOLINT: left uninitialised on purpose
};

// Working memory of one call on a shape that may be without rows.
inline std::size_t scratch_for(kernels::Shape shape, std::size_t (*doubles)(const kernels::Shape&)) {
  shape.n = std::max<int64_t>(shape.n, 1);
  shape.l = std::max<int64_t>(shape.l, 1);
  return doubles(shape);
}

inline int thread_count() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
}

// The arguments of a forward, but for its results and its momentum; owns what they point into.
class ForwardCall {
 public:
  ForwardCall(const at::Tensor& input, const std::optional<at::Tensor>& weight,
              const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
              const std::optional<at::Tensor>& running_var, bool training, double eps, int64_t relu)
      : scratch_(scratch_for(shape_of(input), kernels::forward_scratch)) {
    args.shape = shape_of(input);
    args.dtype = kernel_dtype(input.scalar_type());
    args.param_dtype = kernel_dtype(parameter_dtype(input, running_mean, bias, weight));
    args.relu = static_cast<kernels::Relu>(relu);
    args.training = training;
    args.eps = eps;
    args.input = view_of(input);
    args.weight = parameter_view(weight, weight_);
    args.bias = parameter_view(bias, bias_);
    args.running_mean = statistics_view(running_mean, training);
    args.running_var = statistics_view(running_var, training);
    args.scratch = scratch_.data();
    args.threads = thread_count();
    args.stream_from = kernels::stream_from();
  }
  ForwardCall(const ForwardCall&) = delete;
  ForwardCall& operator=(const ForwardCall&) = delete;

  kernels::ForwardArgs args{};

 private:
  at::Tensor weight_;
  at::Tensor bias_;
  Scratch scratch_;
};

// Likewise of a backward; stats begin with the mean and invstd of each channel.
class BackwardCall {
 public:
  BackwardCall(const at::Tensor& grad_output, const at::Tensor& input, const std::optional<at::Tensor>& weight,
               const std::optional<at::Tensor>& bias, const at::Tensor& stats, bool training, int64_t relu)
      : param_dtype(parameter_dtype(input, bias, weight)),
        stats_(stats.contiguous()),
        scratch_(scratch_for(shape_of(input), kernels::backward_scratch)) {
    args.shape = shape_of(input);
    args.dtype = kernel_dtype(input.scalar_type());
    args.param_dtype = kernel_dtype(param_dtype);
    args.relu = static_cast<kernels::Relu>(relu);
    args.training = training;
    args.grad_output = view_of(grad_output);
    args.input = view_of(input);
    args.weight = parameter_view(weight, weight_);
    args.bias = parameter_view(bias, bias_);
    args.mean = stats_.const_data_ptr<double>();
    args.invstd = args.mean + args.shape.c;
    args.scratch = scratch_.data();
    args.threads = thread_count();
    args.stream_from = kernels::stream_from();
  }
  BackwardCall(const BackwardCall&) = delete;
  BackwardCall& operator=(const BackwardCall&) = delete;

  const at::ScalarType param_dtype;
  kernels::BackwardArgs args{};

 private:
  at::Tensor stats_;
  at::Tensor weight_;
  at::Tensor bias_;
  Scratch scratch_;
};

// Counts a batch where there is a counter, and returns its share in the running statistics. The last thing to do
// before a kernel runs: nothing after it can fail, so that a refused call has changed nothing.
inline double count_batch(const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum) {
  if (!is_given(num_batches_tracked)) return momentum.value_or(0.0);
  auto* counter = num_batches_tracked->mutable_data_ptr<int64_t>();
  ++*counter;
  return momentum ? *momentum : 1.0 / static_cast<double>(*counter);
}

}  // namespace torch_bn::ops
