// The proof: at a step of training, our layer and torch's against float64, from the same weights and batch.
#pragma once

#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <iosfwd>
#include <string>
#include <utility>
#include <vector>

#include "model.h"

// Compares a model with a twin that has torch's layer and a twin in float64, which take its state each time.
//
// An error is max |a - a64| / s, with s the size of what was summed. Float64 takes the ReLU masks of the model it
// judges: a pre-activation within rounding of zero may fall on either side, and a flipped mask would be an error
// far beyond rounding in a correct implementation. At each step our error may be twice that of torch's layer and
// 64 roundings; in the mean over the run 1.1 times and 2 roundings. A doubled eps is an error of 40 in the mean.
class StepProof {
 public:
  StepProof(int64_t features, Placement placement);

  // Whether a step is one that is compared: the first 100 and every 50th after them.
  static bool is_due(int64_t step) { return step < 100 || step % 50 == 0; }

  // Runs the batch through `model`, leaving its gradients filled, and through the twins. Returns logits and loss.
  std::pair<torch::Tensor, torch::Tensor> check(Mlp& model, const torch::Tensor& x, const torch::Tensor& y);

  // Prints each figure's worst and mean beside their bounds; whether all hold.
  bool report(std::ostream& out) const;

  void save(torch::serialize::OutputArchive& archive) const;
  void load(torch::serialize::InputArchive& archive);

 private:
  Mlp builtin_;
  Mlp exact_;
  Placement placement_;
  std::vector<std::string> names_;
  torch::Tensor errors_;  // (steps, names, 2) float64: ours and torch's
  int64_t wrong_counters_ = 0;
};

// Forward and backward of one batch from empty gradients: logits and mean loss, detached.
std::pair<torch::Tensor, torch::Tensor> gradients(Mlp& model, const torch::Tensor& x, const torch::Tensor& y,
                                                  Trace* trace = nullptr, const Masks* masks = nullptr);
