/// \file
/// All of torch_bn's C++ API.
///
/// ```cpp
/// #include <torch/torch.h>
/// #include <torch_bn/torch_bn.h>
///
/// torch::nn::Sequential model(torch::nn::Linear(784, 300), torch_bn::BatchNorm1d(300), torch::nn::ReLU());
/// assert(model->forward(torch::randn({64, 784})).sizes() == torch::IntArrayRef({64, 300}));
/// ```
#pragma once

#include <torch_bn/build_info.h>
#include <torch_bn/functional.h>
#include <torch_bn/modules.h>
#include <torch_bn/options.h>
#include <torch_bn/sync.h>
