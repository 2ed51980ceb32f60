/// \file
/// The functional form.
#pragma once

#include <torch/types.h>
#include <torch_bn/options.h>

namespace torch_bn::functional {

/// Normalises each channel of a batch: y = (x - mean) / sqrt(var + eps) * weight + bias.
///
/// (Ioffe and Szegedy 2015, algorithm 1.) In training, mean and biased variance are the batch's, and the running
/// statistics move towards its mean and unbiased variance by `momentum`; in evaluation they are the running
/// statistics. Differentiable to any order. The result has the same bits on every number of threads.
///
/// \param input (N, C) or (N, C, L); float32, float64, bfloat16 or float16, of any strides. Other ranks, devices
///   and layouts are served by torch's own implementation.
/// \param running_mean (C), of the input's type or float32 beside a 16-bit input; updated in place in training,
///   where it may be undefined
/// \param running_var likewise
/// \param options weight, bias, training, momentum and eps
/// \return a contiguous tensor of the input's shape and type
/// \throws c10::Error with the words of `torch::nn::functional::batch_norm`, if there is one value per channel in
///   training, or a size or type does not fit; then nothing has been written
///
/// ```cpp
/// namespace F = torch_bn::functional;
/// auto x = torch::tensor({{1.0f}, {2.0f}, {3.0f}});
/// auto mean = torch::zeros(1), var = torch::ones(1), weight = torch::full(1, 2.0f);
/// auto options = F::BatchNormFuncOptions().weight(weight).training(true).momentum(0.5);
/// auto y = F::batch_norm(x, mean, var, options);  // -2.4495, 0, 2.4495
/// assert(mean.item<float>() == 1);
/// ```
torch::Tensor batch_norm(const torch::Tensor& input, const torch::Tensor& running_mean,
                         const torch::Tensor& running_var, const BatchNormFuncOptions& options = {});

/// relu(batch_norm(input)) in the sweeps of the batch norm alone; parameters, result and errors are those of
/// `batch_norm`. Backward computes the ReLU's mask again from the input, with the bits of the forward.
///
/// ```cpp
/// auto x = torch::tensor({{-1.0f}, {4.0f}});
/// auto y = torch_bn::functional::batch_norm_relu(x, torch::zeros(1), torch::ones(1));
/// assert(y[0].item<float>() == 0);
/// ```
torch::Tensor batch_norm_relu(const torch::Tensor& input, const torch::Tensor& running_mean,
                              const torch::Tensor& running_var, const BatchNormFuncOptions& options = {});

/// batch_norm(relu(input)) in the sweeps of the batch norm alone, otherwise like `batch_norm`. The statistics are
/// those of relu(input).
///
/// ```cpp
/// auto x = torch::tensor({{-1.0f}, {1.0f}, {2.0f}});
/// auto options = torch_bn::functional::BatchNormFuncOptions().training(true);
/// auto y = torch_bn::functional::relu_batch_norm(x, {}, {}, options);  // -1.2247, 0, 1.2247
/// assert(y[1].item<float>() == 0);
/// ```
torch::Tensor relu_batch_norm(const torch::Tensor& input, const torch::Tensor& running_mean,
                              const torch::Tensor& running_var, const BatchNormFuncOptions& options = {});

}  // namespace torch_bn::functional
