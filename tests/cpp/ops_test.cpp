// The registered operators from C++: values against ATen in float64, gradients against finite differences,
// refusals, and what is written in place.
#include "ops/ops.h"

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdlib>
#include <filesystem>

namespace torch_bn::testing {
namespace {

using ops::batch_norm_forward;

struct Layer {
  at::Tensor weight, bias, running_mean, running_var, counter;

  Layer(int64_t channels, at::ScalarType dtype) {
    const auto options = at::TensorOptions().dtype(dtype);
    weight = torch::linspace(0.5, 2.0, channels, options);
    bias = torch::linspace(-1.0, 1.0, channels, options);
    running_mean = torch::linspace(-0.5, 0.5, channels, options);
    running_var = torch::linspace(0.5, 1.5, channels, options);
    counter = torch::zeros({}, at::kLong);
  }

  at::Tensor operator()(const at::Tensor& x, bool training, std::optional<double> momentum = 0.1,
                        double eps = 1e-5) const {
    return std::get<0>(
        batch_norm_forward(x, weight, bias, running_mean, running_var, counter, training, momentum, eps, 0));
  }

  // torch's own, in the dtype of its arguments.
  static at::Tensor builtin(const Layer& layer, const at::Tensor& x, bool training) {
    return at::batch_norm(x, layer.weight, layer.bias, layer.running_mean, layer.running_var, training, 0.1, 1e-5,
                          false);
  }
};

TEST(Ops, AgreeWithATenInFloat64) {
  torch::manual_seed(1);
  const std::vector<std::vector<int64_t>> shapes = {{6, 3}, {300, 5}, {4, 3, 7}, {2, 2, 400}};
  for (const auto& shape : shapes)
    for (const bool training : {true, false}) {
      Layer ours(shape[1], at::kDouble);
      Layer theirs(shape[1], at::kDouble);
      const auto x = torch::randn(shape, at::kDouble).set_requires_grad(true);
      const auto g = torch::randn(shape, at::kDouble);
      for (Layer* layer : {&ours, &theirs})
        for (at::Tensor* parameter : {&layer->weight, &layer->bias}) parameter->set_requires_grad(true);
      const auto y = ours(x, training);
      const auto want = Layer::builtin(theirs, x, training);
      // Both compute in double; what differs is the order of sums over at most 800 rows.
      EXPECT_TRUE(torch::allclose(y, want, 1e-12, 1e-12));
      const auto grads = torch::autograd::grad({y}, {x, ours.weight, ours.bias}, {g});
      const auto wants = torch::autograd::grad({want}, {x, theirs.weight, theirs.bias}, {g});
      for (std::size_t i = 0; i < grads.size(); ++i)
        EXPECT_TRUE(torch::allclose(grads[i], wants[i], 1e-12, 1e-12));
      EXPECT_TRUE(torch::allclose(ours.running_mean, theirs.running_mean, 1e-12, 1e-12));
      EXPECT_TRUE(torch::allclose(ours.running_var, theirs.running_var, 1e-12, 1e-12));
      EXPECT_EQ(ours.counter.item<int64_t>(), training ? 1 : 0);
    }
}

// The gradient of sum(v * first derivatives), the double backward, against central differences.
TEST(Ops, DoubleBackwardAgreesWithFiniteDifferences) {
  torch::manual_seed(2);
  const double step = 1e-5;
  for (const bool training : {true, false}) {
    Layer layer(3, at::kDouble);
    auto x = torch::randn({5, 3}, at::kDouble).set_requires_grad(true);
    layer.weight.set_requires_grad(true);
    layer.bias.set_requires_grad(true);
    const auto g = torch::randn({5, 3}, at::kDouble).set_requires_grad(true);
    const auto vx = torch::randn({5, 3}, at::kDouble);
    const auto vw = torch::randn({3}, at::kDouble);
    const auto vb = torch::randn({3}, at::kDouble);
    auto phi = [&](bool create_graph) {
      const auto y = layer(x, training);
      const auto d = torch::autograd::grad({y}, {x, layer.weight, layer.bias}, {g}, true, create_graph);
      return (d[0] * vx).sum() + (d[1] * vw).sum() + (d[2] * vb).sum();
    };
    const auto analytic = torch::autograd::grad({phi(true)}, {x, layer.weight, g}, {}, false, false, true);
    const std::vector<at::Tensor> variables = {x, layer.weight, g};
    for (std::size_t v = 0; v < variables.size(); ++v) {
      const auto flat = variables[v].detach().view(-1);
      for (int64_t i = 0; i < flat.numel(); ++i) {
        const double at_point = flat[i].item<double>();
        flat[i].fill_(at_point + step);
        const double above = phi(false).item<double>();
        flat[i].fill_(at_point - step);
        const double below = phi(false).item<double>();
        flat[i].fill_(at_point);
        const double numeric = (above - below) / (2 * step);
        const double got = analytic[v].defined() ? analytic[v].view(-1)[i].item<double>() : 0.0;
        // Central differences err by step^2 times a third derivative of order 100.
        EXPECT_NEAR(got, numeric, 1e-7) << "training " << training << " variable " << v << " index " << i;
      }
    }
  }
}

TEST(Ops, CumulativeAverageIsTheMeanOfAllBatches) {
  Layer layer(2, at::kDouble);
  torch::manual_seed(3);
  auto sum_mean = torch::zeros({2}, at::kDouble);
  for (int i = 1; i <= 4; ++i) {
    const auto x = torch::randn({8, 2}, at::kDouble);
    layer(x, true, std::nullopt);
    sum_mean += x.mean(0);
    EXPECT_TRUE(torch::allclose(layer.running_mean, sum_mean / i, 1e-14, 1e-14));
    EXPECT_EQ(layer.counter.item<int64_t>(), i);
  }
}

TEST(Ops, InPlaceWritesAdvanceTheVersionCounters) {
  Layer layer(2, at::kFloat);
  const auto versions = [&] {
    return std::array{layer.running_mean._version(), layer.running_var._version(), layer.counter._version()};
  };
  const auto before = versions();
  layer(torch::randn({4, 2}), true);
  const auto after = versions();
  for (std::size_t i = 0; i < before.size(); ++i) EXPECT_GT(after[i], before[i]);
  layer(torch::randn({4, 2}), false);
  EXPECT_EQ(versions(), after);
}

// Every refusal comes before anything is written.
// A hook of C++ sees the gradient without keeping it. tests/python/test_gradient_in_place.py has what may not be
// overwritten.
TEST(Ops, ADeadGradientIsOverwritten) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{50, 6}, {4, 6, 40}})
    for (const bool training : {true, false}) {
      const Layer layer(6, at::kFloat);
      const auto x = torch::randn(shape).set_requires_grad(true);
      const auto factor = torch::randn(shape);
      const auto y = layer(x, training);
      const void* passed = nullptr;
      y.register_hook([&](const at::Tensor& grad) { passed = grad.const_data_ptr(); });
      (y * factor).sum().backward();
      EXPECT_EQ(x.grad().const_data_ptr(), passed);
      const auto again = x.detach().set_requires_grad(true);
      const Layer same(6, at::kFloat);
      EXPECT_TRUE(torch::equal(x.grad(), torch::autograd::grad({same(again, training)}, {again}, {factor})[0]));
    }
}

TEST(Ops, RefusedCallsChangeNothing) {
  struct Case {
    const char* words;
    std::function<void(const Layer&)> call;
  };
  const std::vector<Case> cases = {
      {"expected 2D or 3D input (got 1D input)", [](const Layer& l) { l(torch::randn({3}), true); }},
      {"expected 2D or 3D input (got 4D input)", [](const Layer& l) { l(torch::randn({2, 3, 2, 2}), true); }},
      {"running_mean should contain 4 elements not 3", [](const Layer& l) { l(torch::randn({5, 4}), true); }},
      {"Expected more than 1 value per channel when training, got input size torch.Size([1, 3])",
       [](const Layer& l) { l(torch::randn({1, 3}), true); }},
      {"\"batch_norm\" not implemented for 'Long'",
       [](const Layer& l) { l(torch::ones({5, 3}, at::kLong), true); }},
      {"mixed dtype (CPU): all inputs must share same datatype.",
       [](const Layer& l) { l(torch::randn({5, 3}, at::kDouble), true); }},
      {"batch_norm eps must be positive during training, but got 0.0",
       [](const Layer& l) { l(torch::randn({5, 3}), true, 0.1, 0.0); }},
      {"batch_norm eps must be non-negative, but got -1.0",
       [](const Layer& l) { l(torch::randn({5, 3}), false, 0.1, -1.0); }},
  };
  for (const Case& refused : cases) {
    const Layer layer(3, at::kFloat);
    const Layer untouched(3, at::kFloat);
    try {
      refused.call(layer);
      ADD_FAILURE() << "accepted: " << refused.words;
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find(refused.words), std::string::npos) << error.what();
    }
    EXPECT_TRUE(torch::equal(layer.running_mean, untouched.running_mean));
    EXPECT_TRUE(torch::equal(layer.running_var, untouched.running_var));
    EXPECT_EQ(layer.counter.item<int64_t>(), 0);
  }
}

// The set is chosen when a program starts, so the variable is set for another one, which runs this test too.
TEST(Operators, AnUnknownInstructionSetIsRefusedByTheFirstCall) {
  const char* asked = std::getenv("TORCH_BN_ISA");
  if (asked == nullptr || std::string(asked) != "sse9") {
    const std::string program = std::filesystem::read_symlink("/proc/self/exe");
    const std::string filter = "*AnUnknownInstructionSetIsRefusedByTheFirstCall";
    EXPECT_EQ(std::system(("TORCH_BN_ISA=sse9 '" + program + "' --gtest_filter='" + filter + "'").c_str()), 0);
    return;
  }
  try {
    Layer(3, at::kFloat)(torch::randn({4, 3}), true);
    ADD_FAILURE() << "accepted";
  } catch (const c10::Error& error) {
    EXPECT_NE(std::string(error.what()).find("TORCH_BN_ISA=sse9: unknown instruction set"), std::string::npos);
  }
}

}  // namespace
}  // namespace torch_bn::testing
