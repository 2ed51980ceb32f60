// MNIST, split and scaled for an MLP, and its batches.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <string>
#include <utility>

struct Split {
  torch::Tensor inputs;  // (n, features) float32
  torch::Tensor labels;  // (n) int64
};

struct Dataset {
  Split train;
  Split validation;  // the last tenth of the training images
  Split test;
  uint32_t checksum;  // CRC-32 of all pixels and labels as read
};

// From the four IDX files in a folder, plain or .gz; inputs are scaled by the mean and standard deviation over all
// pixels of the images trained on. Throws std::runtime_error, with one line, for unusable files.
Dataset load_mnist(const std::string& folder);

// The batches of a split, in an order that depends on the seed and the epoch alone: so nothing about the order has
// to be saved to resume.
class Batches {
 public:
  Batches(const Split& split, int64_t size, int64_t seed);
  int64_t per_epoch() const { return per_epoch_; }
  // Of the step counted over all epochs: inputs and labels.
  std::pair<torch::Tensor, torch::Tensor> at(int64_t step);

 private:
  const Split& split_;
  int64_t size_;
  int64_t seed_;
  int64_t per_epoch_;
  int64_t epoch_ = -1;
  torch::Tensor order_;
};
