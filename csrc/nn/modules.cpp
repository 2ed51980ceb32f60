#include <torch/nn/init.h>
#include <torch_bn/modules.h>
#include <torch_bn/sync.h>

#include "sequences.h"
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
  stream << ", track_running_stats=" << options.track_running_stats();
  if (options.virtual_batch_size()) stream << ", virtual_batch_size=" << *options.virtual_batch_size();
  if (options.channels_last()) stream << ", channels_last=true";
  stream << ')';
}

template class BatchNormImplBase<BatchNorm1dImpl>;
template class BatchNormImplBase<BatchNormReLU1dImpl>;
template class BatchNormImplBase<ReLUBatchNorm1dImpl>;
template class BatchNormImplBase<SyncBatchNorm1dImpl>;
template class BatchNormImplBase<SyncBatchNormReLU1dImpl>;
template class BatchNormImplBase<SyncReLUBatchNorm1dImpl>;

}  // namespace detail

namespace {

template <typename Module>
nn::Layer layer_of(const Module& module) {
  const bool training = module.is_training();
  const bool tracks = module.options.track_running_stats();
  return {module.weight,
          module.bias,
          module.running_mean,
          module.running_var,
          training && tracks ? module.num_batches_tracked : torch::Tensor(),
          /*by_batch=*/training || !tracks,
          module.options.momentum(),
          module.options.eps(),
          training ? module.options.virtual_batch_size() : std::nullopt,
          module.options.channels_last()};
}

template <typename Module>
torch::Tensor forward(ops::Relu relu, const Module& module, const torch::Tensor& input) {
  TORCH_CHECK(input.dim() == 2 || input.dim() == 3, "expected 2D or 3D input (got ", input.dim(), "D input)");
  const nn::Layer layer = layer_of(module);
  if (layer.virtual_batch_size || layer.channels_last) {
    // With these a ReLU is an operation of its own.
    const auto y = nn::sequences(relu == ops::Relu::before ? torch::relu(input) : input, layer);
    return relu == ops::Relu::after ? torch::relu(y) : y;
  }
  return nn::batch_norm(relu, input, layer.weight, layer.bias, layer.running_mean, layer.running_var,
                        layer.num_batches_tracked, layer.by_batch, layer.momentum, layer.eps);
}

}  // namespace

const char* BatchNorm1dImpl::layer_name() {
  return "BatchNorm1d";
}
torch::Tensor BatchNorm1dImpl::forward(const torch::Tensor& input) {
  return torch_bn::forward(ops::Relu::none, *this, input);
}
torch::Tensor BatchNorm1dImpl::forward_masked(const torch::Tensor& input, const torch::Tensor& steps) {
  return nn::masked_sequences(input, steps, layer_of(*this));
}

const char* BatchNormReLU1dImpl::layer_name() {
  return "BatchNormReLU1d";
}
torch::Tensor BatchNormReLU1dImpl::forward(const torch::Tensor& input) {
  return torch_bn::forward(ops::Relu::after, *this, input);
}

const char* ReLUBatchNorm1dImpl::layer_name() {
  return "ReLUBatchNorm1d";
}
torch::Tensor ReLUBatchNorm1dImpl::forward(const torch::Tensor& input) {
  return torch_bn::forward(ops::Relu::before, *this, input);
}

}  // namespace torch_bn
