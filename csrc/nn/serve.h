// Who serves a call: our operator, or where it cannot, torch's own implementation in silence.
#pragma once

#include <torch/types.h>

#include <optional>

#include "../ops/ops.h"

namespace torch_bn::nn {

// The layer's arithmetic, ReLU and counter included, whoever computes it. Any tensor but the input may be
// undefined. Throws what torch throws, with its words; then nothing has been written.
torch::Tensor batch_norm(ops::Relu relu, const torch::Tensor& input, const torch::Tensor& weight,
                         const torch::Tensor& bias, const torch::Tensor& running_mean,
                         const torch::Tensor& running_var, const torch::Tensor& num_batches_tracked, bool training,
                         std::optional<double> momentum, double eps);

// The share of the coming batch in the running statistics.
double factor_of(std::optional<double> momentum, const torch::Tensor& num_batches_tracked);

// Module::to(dtype) in C++ converts the counter too, as torch's layer takes one of any type. Our operators do not:
// they are called without it and with factor_of(), and it is counted here.
bool is_counted_apart(const torch::Tensor& num_batches_tracked);

}  // namespace torch_bn::nn
