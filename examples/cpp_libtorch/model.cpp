#include "model.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>

#include <cmath>

namespace {

constexpr int64_t kHidden[] = {300, 100};
constexpr int64_t kClasses = 10;

torch::nn::Linear dense(int64_t inputs, int64_t outputs, bool bias, at::Generator& source) {
  torch::nn::Linear layer(torch::nn::LinearOptions(inputs, outputs).bias(bias));
  const torch::NoGradGuard guard;
  const double bound = 1 / std::sqrt(static_cast<double>(inputs));
  for (auto& parameter : layer->parameters()) parameter.uniform_(-bound, bound, source);
  return layer;
}

}  // namespace

Mlp::Mlp(int64_t features, Placement placement, Norm norm, int64_t seed) {
  at::Generator source = at::detail::createCPUGenerator(static_cast<uint64_t>(seed));
  const auto add = [&](const std::string& name, auto layer) {
    layers_.emplace_back(name, torch::nn::AnyModule(register_module(name, layer)));
  };
  const auto add_norm = [&](const std::string& name, int64_t units) {
    if (norm == Norm::ours) {
      add(name, torch_bn::BatchNorm1d(units));
    } else {
      add(name, torch::nn::BatchNorm1d(units));
    }
  };
  int64_t width = features;
  std::string number = "1";
  for (const int64_t units : kHidden) {
    add("dense" + number, dense(width, units, placement == Placement::after, source));
    if (placement == Placement::before) add_norm("bn" + number, units);
    layers_.emplace_back("relu" + number, torch::nn::AnyModule());
    if (placement == Placement::after) add_norm("bn" + number, units);
    width = units;
    ++number[0];
  }
  add("dense" + number, dense(width, kClasses, /*bias=*/true, source));
}

torch::Tensor Mlp::forward(torch::Tensor x, Trace* trace, const Masks* masks) {
  for (auto& [name, layer] : layers_) {
    torch::Tensor y;
    if (!layer.is_empty()) {
      y = layer.forward(x);
    } else {
      y = masks != nullptr ? x * masks->at(name) : torch::relu(x);
    }
    if (trace != nullptr) {
      for (const auto& tensor : {x, y})
        if (tensor.requires_grad()) tensor.retain_grad();
      trace->input[name] = x;
      trace->output[name] = y;
    }
    x = y;
  }
  return x;
}

void copy_state(const Mlp& from, Mlp& to) {
  const torch::NoGradGuard guard;
  const auto copy = [](const auto& source, const auto& target) {
    for (const auto& item : target) item.value().copy_(source[item.key()]);
  };
  copy(from.named_parameters(), to.named_parameters());
  copy(from.named_buffers(), to.named_buffers());
}
