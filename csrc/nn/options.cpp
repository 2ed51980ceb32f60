#include <torch_bn/options.h>

namespace torch_bn {

BatchNorm1dOptions::BatchNorm1dOptions(int64_t num_features) : num_features_(num_features) {}

BatchNorm1dOptions::BatchNorm1dOptions(const torch::nn::BatchNorm1dOptions& options)
    : num_features_(options.num_features()),
      eps_(options.eps()),
      momentum_(options.momentum()),
      affine_(options.affine()),
      track_running_stats_(options.track_running_stats()) {}

functional::BatchNormFuncOptions::BatchNormFuncOptions(const torch::nn::functional::BatchNormFuncOptions& options)
    : weight_(options.weight()),
      bias_(options.bias()),
      training_(options.training()),
      momentum_(options.momentum()),
      eps_(options.eps()) {}

}  // namespace torch_bn
