#include <torch_bn/functional.h>

#include "serve.h"

namespace torch_bn::functional {

torch::Tensor batch_norm(const torch::Tensor& input, const torch::Tensor& running_mean,
                         const torch::Tensor& running_var, const BatchNormFuncOptions& options) {
  return nn::batch_norm(input, options.weight(), options.bias(), running_mean, running_var,
                        /*num_batches_tracked=*/{}, options.training(), options.momentum(), options.eps());
}

}  // namespace torch_bn::functional
