#include <torch_bn/functional.h>

#include "serve.h"

namespace torch_bn::functional {

namespace {

torch::Tensor with_relu(ops::Relu relu, const torch::Tensor& input, const torch::Tensor& running_mean,
                        const torch::Tensor& running_var, const BatchNormFuncOptions& options) {
  return nn::batch_norm(relu, input, options.weight(), options.bias(), running_mean, running_var,
                        /*num_batches_tracked=*/{}, options.training(), options.momentum(), options.eps());
}

}  // namespace

torch::Tensor batch_norm(const torch::Tensor& input, const torch::Tensor& running_mean,
                         const torch::Tensor& running_var, const BatchNormFuncOptions& options) {
  return with_relu(ops::Relu::none, input, running_mean, running_var, options);
}

torch::Tensor batch_norm_relu(const torch::Tensor& input, const torch::Tensor& running_mean,
                              const torch::Tensor& running_var, const BatchNormFuncOptions& options) {
  return with_relu(ops::Relu::after, input, running_mean, running_var, options);
}

torch::Tensor relu_batch_norm(const torch::Tensor& input, const torch::Tensor& running_mean,
                              const torch::Tensor& running_var, const BatchNormFuncOptions& options) {
  return with_relu(ops::Relu::before, input, running_mean, running_var, options);
}

}  // namespace torch_bn::functional
