// The network: Dense 300, ReLU, Dense 100, ReLU, Dense 10, with a batch norm before or after each ReLU.
#pragma once

#include <torch/nn/module.h>
#include <torch/nn/modules/container/any.h>
#include <torch/types.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "options.h"

// What each layer takes and gives in one forward, by the layer's name. After a backward the tensors carry their
// gradients, except the data itself.
struct Trace {
  std::map<std::string, torch::Tensor> input;
  std::map<std::string, torch::Tensor> output;
};

// Where each ReLU lets its input pass, by the layer's name.
using Masks = std::map<std::string, torch::Tensor>;

class Mlp : public torch::nn::Module {
 public:
  enum class Norm { ours, builtin };

  // The same seed gives the same initial weights with either layer. Before a batch norm Dense has no bias: it
  // would be subtracted again.
  Mlp(int64_t features, Placement placement, Norm norm, int64_t seed);

  // Logits (N, 10). With masks the ReLUs take those instead of the sign of their input.
  torch::Tensor forward(torch::Tensor x, Trace* trace = nullptr, const Masks* masks = nullptr);

 private:
  std::vector<std::pair<std::string, torch::nn::AnyModule>> layers_;  // without a module: a ReLU
};

// Gives `to` the parameters and buffers of `from`, in its own type.
void copy_state(const Mlp& from, Mlp& to);
