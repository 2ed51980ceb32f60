// The C++ layer's own options: chunks of the batch, channels as the last dimension, padded steps.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>

#include <limits>
#include <sstream>
#include <vector>

namespace torch_bn::testing {
namespace {

BatchNorm1dOptions of(int64_t channels) {
  return BatchNorm1dOptions(channels);
}

void expect_same_buffers(const BatchNorm1d& a, const BatchNorm1d& b) {
  EXPECT_TRUE(torch::equal(a->running_mean, b->running_mean));
  EXPECT_TRUE(torch::equal(a->running_var, b->running_var));
  EXPECT_TRUE(torch::equal(a->num_batches_tracked, b->num_batches_tracked));
}

// Gradients of a step, of the input first.
std::vector<at::Tensor> gradients(BatchNorm1d& layer, const at::Tensor& x, const at::Tensor& y) {
  return torch::autograd::grad({(y * y * y).sum()}, {x, layer->weight, layer->bias});
}

TEST(Ghost, HasTheBitsOfALoopOverChunks) {
  torch::manual_seed(0);
  for (const int64_t rows : {12, 14, 13}) {  // whole chunks, a short one, a last row that joins
    BatchNorm1d ghost(of(5).virtual_batch_size(4));
    BatchNorm1d ordinary(of(5));
    const auto x = torch::randn({rows, 5}).requires_grad_();
    std::vector<int64_t> sizes(rows / 4, 4);
    if (rows % 4 > 1) sizes.push_back(rows % 4);
    if (rows % 4 == 1) ++sizes.back();
    std::vector<at::Tensor> parts;
    for (const auto& part : x.split_with_sizes(sizes)) parts.push_back(ordinary(part));
    const auto y = ghost(x);
    EXPECT_TRUE(torch::equal(y, torch::cat(parts)));
    EXPECT_EQ(ghost->num_batches_tracked.item<int64_t>(), static_cast<int64_t>(sizes.size()));
    expect_same_buffers(ghost, ordinary);
    EXPECT_TRUE(torch::equal(gradients(ghost, x, y)[0], gradients(ordinary, x, torch::cat(parts))[0]));
    ghost->eval();
    ordinary->eval();
    EXPECT_TRUE(torch::equal(ghost(x), ordinary(x)));
  }
}

TEST(Ghost, ConvertedLayersCountToo) {
  BatchNorm1d ghost(of(3).virtual_batch_size(4).momentum(std::nullopt));
  ghost->to(torch::kDouble);  // the counter too
  const auto x = torch::randn({10, 3}, torch::kDouble);
  ghost(x);
  EXPECT_EQ(ghost->num_batches_tracked.item<double>(), 3.0);
}

TEST(Ghost, RefusesAndLeavesTheBuffers) {
  for (const int64_t size : {0, -1, 1}) {
    BatchNorm1d ghost(of(3).virtual_batch_size(size));
    BatchNorm1d fresh(of(3));
    EXPECT_THROW(ghost(torch::randn({8, 3})), c10::ValueError) << size;
    expect_same_buffers(ghost, fresh);
  }
}

TEST(Sequences, ChannelsLastIsTheTransposedLayer) {
  torch::manual_seed(0);
  for (const bool contiguous : {true, false}) {
    BatchNorm1d last(of(5).channels_last(true));
    BatchNorm1d ordinary(of(5));
    const auto x = contiguous ? torch::randn({4, 7, 5}) : torch::randn({4, 5, 7}).transpose(1, 2);
    const auto y = last(x);
    EXPECT_TRUE(y.is_contiguous());
    // Another layout: a rounding of float32 or two.
    EXPECT_TRUE(torch::allclose(y, ordinary(x.transpose(1, 2)).transpose(1, 2), 0, 1e-6));
    if (contiguous) {
      EXPECT_TRUE(torch::equal(y.flatten(0, 1), BatchNorm1d(of(5))(x.flatten(0, 1))));
    }
    const auto matrix = torch::randn({4, 5});
    EXPECT_TRUE(torch::equal(last(matrix), ordinary(matrix)));
  }
  EXPECT_THROW(BatchNorm1d(of(5).channels_last(true))(torch::randn({1, 1, 5})), c10::ValueError);
}

TEST(Sequences, PaddedStepsAreLeftOut) {
  torch::manual_seed(0);
  const auto lengths = torch::tensor({7, 3, 0, 6}, torch::kLong);
  const auto mask = torch::arange(7) < lengths.unsqueeze(1);
  for (const bool last : {true, false}) {
    for (const auto& steps : {lengths, lengths.to(at::kUInt16), lengths.to(at::kUInt64), mask}) {
      BatchNorm1d layer(of(5).channels_last(last));
      BatchNorm1d packed(of(5));
      auto by_steps = torch::randn({4, 7, 5});
      by_steps.index_put_({~mask}, std::numeric_limits<float>::quiet_NaN());
      const auto x = (last ? by_steps : by_steps.transpose(1, 2).contiguous()).requires_grad_();
      const auto rows = by_steps.detach().index({mask}).requires_grad_();
      const auto y = layer->forward_masked(x, steps);
      const auto want = packed(rows);
      const auto result = last ? y : y.transpose(1, 2);
      EXPECT_TRUE(y.is_contiguous());
      EXPECT_TRUE(torch::equal(result.index({mask}), want));
      EXPECT_EQ(result.index({~mask}).count_nonzero().item<int64_t>(), 0);
      expect_same_buffers(layer, packed);
      const auto grad = gradients(layer, x, y)[0];
      const auto grad_by_steps = last ? grad : grad.transpose(1, 2);
      EXPECT_TRUE(torch::equal(grad_by_steps.index({mask}), gradients(packed, rows, want)[0]));
      EXPECT_EQ(grad_by_steps.index({~mask}).count_nonzero().item<int64_t>(), 0);
    }
  }
}

TEST(Sequences, PaddedStepsInChunks) {
  torch::manual_seed(0);
  BatchNorm1d layer(of(5).channels_last(true).virtual_batch_size(2));
  BatchNorm1d ordinary(of(5));
  const auto x = torch::randn({5, 7, 5});
  const auto mask = torch::arange(7) < torch::tensor({7, 3, 4, 0, 1}).unsqueeze(1);
  const auto y = layer->forward_masked(x, mask);
  const auto rows = x.index({mask}).split_with_sizes({10, 5});  // the last one joins the chunk before
  EXPECT_TRUE(torch::equal(y.index({mask}), torch::cat({ordinary(rows[0]), ordinary(rows[1])})));
  expect_same_buffers(layer, ordinary);
}

TEST(Sequences, RefusalsLeaveTheBuffers) {
  BatchNorm1d layer(of(5));
  BatchNorm1d fresh(of(5));
  const auto x = torch::randn({4, 5, 7});
  const auto yes = torch::ones({4, 7}, torch::kBool);
  const auto lengths = torch::full({4}, 7, torch::kLong);
  for (const auto& steps : {yes.slice(1, 1), ~yes, lengths + 1, lengths - 8, lengths.slice(0, 1), lengths * 0})
    EXPECT_THROW(layer->forward_masked(x, steps), c10::ValueError) << steps;
  EXPECT_THROW(layer->forward_masked(x, lengths.to(torch::kFloat)), c10::TypeError);
  EXPECT_THROW(layer->forward_masked(torch::randn({4, 5}), lengths), c10::ValueError);
  expect_same_buffers(layer, fresh);
}

TEST(Sequences, OptionsArePrinted) {
  std::ostringstream text;
  text << BatchNorm1d(of(3).virtual_batch_size(4).channels_last(true));
  EXPECT_NE(text.str().find("virtual_batch_size=4, channels_last=true)"), std::string::npos) << text.str();
  torch::nn::Sequential model(BatchNorm1d(of(3).virtual_batch_size(4)));
  EXPECT_EQ(model->forward(torch::randn({8, 3})).sizes(), at::IntArrayRef({8, 3}));
}

}  // namespace
}  // namespace torch_bn::testing
