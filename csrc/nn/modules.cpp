#include <torch/nn/init.h>
#include <torch_bn/modules.h>
#include <torch_bn/sync.h>

#include "serve.h"

namespace torch_bn {
namespace detail {

template <typename Derived>
BatchNormImplBase<Derived>::BatchNormImplBase(const BatchNorm1dOptions& options) : options(options) {
  BatchNormImplBase::reset();
}

template <typename Derived>
void BatchNormImplBase<Derived>::reset() {
  const auto channels = options.num_features();
  // Absent ones are registered too: clone and load walk over the same names as in torch's layer.
  auto parameter = [&](const char* name, bool wanted) {
    return this->register_parameter(name, wanted ? torch::empty({channels}) : torch::Tensor(),
                                    /*requires_grad=*/wanted);
  };
  auto buffer = [&](const char* name, const torch::Tensor& value) {
    return this->register_buffer(name, options.track_running_stats() ? value : torch::Tensor());
  };
  weight = parameter("weight", options.affine());
  bias = parameter("bias", options.affine() && options.bias());
  running_mean = buffer("running_mean", torch::zeros({channels}));
  running_var = buffer("running_var", torch::ones({channels}));
  num_batches_tracked = buffer("num_batches_tracked", torch::zeros({}, torch::kLong));
  reset_parameters();
}

template <typename Derived>
void BatchNormImplBase<Derived>::reset_parameters() {
  reset_running_stats();
  if (weight.defined()) torch::nn::init::ones_(weight);
  if (bias.defined()) torch::nn::init::zeros_(bias);
}

template <typename Derived>
void BatchNormImplBase<Derived>::reset_running_stats() {
  if (!running_mean.defined()) return;
  running_mean.zero_();
  running_var.fill_(1);
  num_batches_tracked.zero_();
}

template <typename Derived>
void BatchNormImplBase<Derived>::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "torch_bn::" << Derived::layer_name() << '(' << options.num_features()
         << ", eps=" << options.eps() << ", momentum=";
  if (options.momentum()) {
    stream << *options.momentum();
  } else {
    stream << "None";
  }
  stream << ", affine=" << options.affine();
  if (options.affine() && !options.bias()) stream << ", bias=false";
  stream << ", track_running_stats=" << options.track_running_stats() << ')';
}

template class BatchNormImplBase<BatchNorm1dImpl>;
template class BatchNormImplBase<SyncBatchNorm1dImpl>;

}  // namespace detail

const char* BatchNorm1dImpl::layer_name() {
  return "BatchNorm1d";
}

torch::Tensor BatchNorm1dImpl::forward(const torch::Tensor& input) {
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
  const bool training = is_training();
  const bool tracks = options.track_running_stats();
  return nn::batch_norm(input, weight, bias, running_mean, running_var,
                        training && tracks ? num_batches_tracked : torch::Tensor(), training || !tracks,
                        options.momentum(), options.eps());
}

}  // namespace torch_bn
