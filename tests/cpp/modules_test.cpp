// The C++ layer beside torch's: values, gradients, state, files, refusals, and how it behaves as a module.
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>

#include <sstream>
#include <thread>

namespace torch_bn::testing {
namespace {

using Ours = BatchNorm1d;
using Theirs = torch::nn::BatchNorm1d;

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.defined() == b.defined() && (!a.defined() || torch::equal(a, b));
}

// All parameters and buffers by name, of two layers of any kind.
void expect_same_state(const torch::nn::Module& a, const torch::nn::Module& b, double tolerance = 0) {
  auto compare = [&](const auto& left, const auto& right) {
    ASSERT_EQ(left.keys(), right.keys());
    for (const auto& item : left) {
      const at::Tensor& other = right[item.key()];
      EXPECT_EQ(item.value().dtype(), other.dtype()) << item.key();
      EXPECT_EQ(item.value().sizes(), other.sizes()) << item.key();
      EXPECT_TRUE(torch::allclose(item.value(), other, tolerance, tolerance)) << item.key();
    }
  };
  compare(a.named_parameters(), b.named_parameters());
  compare(a.named_buffers(), b.named_buffers());
}

// (affine, track_running_stats, momentum, eps, has length)
using Choice = std::tuple<bool, bool, std::optional<double>, double, bool>;

torch::nn::BatchNorm1dOptions options_of(const Choice& choice) {
  const auto& [affine, tracks, momentum, eps, _] = choice;
  return torch::nn::BatchNorm1dOptions(5).affine(affine).track_running_stats(tracks).momentum(momentum).eps(eps);
}

class Parity : public ::testing::TestWithParam<Choice> {
 protected:
  Parity() : ours(options_of(GetParam())), theirs(options_of(GetParam())) {}

  static at::Tensor draw() {
    return torch::randn(std::get<4>(GetParam()) ? std::vector<int64_t>{4, 5, 7} : std::vector<int64_t>{9, 5},
                        at::kDouble);
  }

  // Another state than the initial one, the same for both.
  void train(int steps) {
    for (int step = 0; step < steps; ++step) {
      auto x = draw().mul(2).add(3).set_requires_grad(true);
      auto x2 = x.detach().clone().set_requires_grad(true);
      const auto g = torch::randn_like(x);
      const auto y = ours(x);
      const auto want = theirs(x2);
      EXPECT_TRUE(torch::allclose(y, want, 1e-12, 1e-12));
      EXPECT_NE(y.grad_fn()->name().find("torch_bn"), std::string::npos) << y.grad_fn()->name();
      y.backward(g);
      want.backward(g);
      EXPECT_TRUE(torch::allclose(x.grad(), x2.grad(), 1e-11, 1e-11));
      const auto parameters = ours->named_parameters();
      for (const auto& item : theirs->named_parameters()) {
        EXPECT_TRUE(torch::allclose(parameters[item.key()].grad(), item.value().grad(), 1e-11, 1e-11));
        const torch::NoGradGuard guard;
        parameters[item.key()].sub_(0.1 * item.value().grad());
        item.value().sub_(0.1 * item.value().grad());
      }
      ours->zero_grad();
      theirs->zero_grad();
    }
  }

  void SetUp() override {
    torch::manual_seed(1);
    ours->to(at::kDouble);
    theirs->to(at::kDouble);
  }

  Ours ours;
  Theirs theirs;
};

INSTANTIATE_TEST_SUITE_P(Options, Parity,
                         ::testing::Combine(::testing::Bool(), ::testing::Bool(),
                                            ::testing::Values(std::optional<double>(0.1),
                                                              std::optional<double>(1.0), std::optional<double>()),
                                            ::testing::Values(1e-5, 0.5), ::testing::Bool()));

TEST_P(Parity, TrainsAndEvaluatesAsTorchDoes) {
  expect_same_state(*ours, *theirs);
  train(3);
  expect_same_state(*ours, *theirs, 1e-12);
  ours->eval();
  theirs->eval();
  train(2);
  expect_same_state(*ours, *theirs, 1e-12);
}

TEST_P(Parity, FilesInterchange) {
  train(2);
  std::stringstream ours_file;
  std::stringstream theirs_file;
  torch::save(ours, ours_file);
  torch::save(theirs, theirs_file);
  Ours loaded(options_of(GetParam()));
  Theirs theirs_loaded(options_of(GetParam()));
  loaded->to(at::kDouble);
  theirs_loaded->to(at::kDouble);
  torch::load(theirs_loaded, ours_file);
  torch::load(loaded, theirs_file);
  expect_same_state(*theirs_loaded, *ours);
  expect_same_state(*loaded, *theirs);
}

TEST_P(Parity, ResetsAndClonesAsTorchDoes) {
  train(1);
  auto clone = std::dynamic_pointer_cast<BatchNorm1dImpl>(ours->clone());
  ASSERT_NE(clone, nullptr);
  expect_same_state(*clone, *ours);
  const auto before = ours->running_mean.defined() ? ours->running_mean.clone() : at::Tensor();
  clone->forward(draw().add(7));
  EXPECT_TRUE(same_bits(ours->running_mean, before));
  ours->reset_running_stats();
  theirs->reset_running_stats();
  expect_same_state(*ours, *theirs, 1e-12);
  ours->reset_parameters();
  theirs->reset_parameters();
  expect_same_state(*ours, *theirs);
}

TEST_P(Parity, GradientsAgreeWithFiniteDifferences) {
  for (const bool training : {true, false}) {
    ours->train(training);
    const auto x = draw().set_requires_grad(true);
    const auto g = torch::randn_like(x);
    const auto phi = [&] { return (ours(x) * g).sum(); };
    const auto parameters = ours->parameters();
    auto variables = parameters;
    variables.push_back(x);
    const auto analytic = torch::autograd::grad({phi()}, variables);
    const double step = 1e-6;
    const torch::NoGradGuard guard;
    for (std::size_t v = 0; v < variables.size(); ++v) {
      const auto flat = variables[v].detach().view(-1);
      for (int64_t i = 0; i < flat.numel(); ++i) {
        // The update of running statistics does not show in training, and in evaluation there is none.
        const double at_point = flat[i].item<double>();
        flat[i].fill_(at_point + step);
        const double above = phi().item<double>();
        flat[i].fill_(at_point - step);
        const double below = phi().item<double>();
        flat[i].fill_(at_point);
        EXPECT_NEAR(analytic[v].view(-1)[i].item<double>(), (above - below) / (2 * step), 1e-7);
      }
    }
  }
}

// The layer of Python that has a weight without a bias.
TEST(BatchNorm1d, WithoutBiasIsAWeightAlone) {
  Ours layer(BatchNorm1dOptions(3).bias(false));
  EXPECT_TRUE(layer->weight.defined());
  EXPECT_FALSE(layer->bias.defined());
  EXPECT_EQ(layer->parameters().size(), 1U);
  Theirs theirs(3);
  const auto x = torch::randn({6, 3});
  EXPECT_TRUE(torch::allclose(layer(x), theirs(x), 1e-5, 1e-6));
  EXPECT_EQ(std::dynamic_pointer_cast<BatchNorm1dImpl>(layer->clone())->parameters().size(), 1U);
  EXPECT_FALSE(Ours(BatchNorm1dOptions(3).affine(false))->bias.defined());
}

TEST(BatchNorm1d, PrintsItsOptions) {
  std::ostringstream text;
  text << Ours(4) << '\n'
       << Ours(BatchNorm1dOptions(7).eps(0.5).momentum(std::nullopt).affine(false).track_running_stats(false))
       << '\n'
       << Ours(BatchNorm1dOptions(2).bias(false));
  EXPECT_EQ(
      text.str(),
      "torch_bn::BatchNorm1d(4, eps=1e-05, momentum=0.1, affine=true, track_running_stats=true)\n"
      "torch_bn::BatchNorm1d(7, eps=0.5, momentum=None, affine=false, track_running_stats=false)\n"
      "torch_bn::BatchNorm1d(2, eps=1e-05, momentum=0.1, affine=true, bias=false, track_running_stats=true)");
}

TEST(BatchNorm1d, LivesInSequentialAndModuleList) {
  torch::manual_seed(2);
  torch::nn::Sequential model(torch::nn::Linear(6, 4), Ours(4), torch::nn::ReLU());
  EXPECT_EQ(model->named_buffers().keys()[0], "1.running_mean");
  const auto y = model->forward(torch::randn({5, 6}));
  EXPECT_EQ(y.sizes(), at::IntArrayRef({5, 4}));
  auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(model->clone());
  expect_same_state(*copy, *model);
  model->to(at::kDouble);
  EXPECT_EQ(model->at<BatchNorm1dImpl>(1).running_var.scalar_type(), at::kDouble);
  EXPECT_EQ(model->forward(torch::randn({5, 6}, at::kDouble)).scalar_type(), at::kDouble);

  torch::nn::ModuleList list(Ours(3), Ours(BatchNorm1dOptions(3).affine(false)));
  for (const auto& module : *list) EXPECT_NE(module->as<Ours>(), nullptr);
  EXPECT_EQ(list->named_parameters().keys(), (std::vector<std::string>{"0.weight", "0.bias"}));
}

// Wrong input is refused in torch's words, and nothing has changed then.
TEST(BatchNorm1d, RefusesInTorchsWords) {
  struct Case {
    at::Tensor input;
    std::function<void(torch::nn::Module&)> change = [](auto&) {};
    bool training = true;
    double eps = 1e-5;
  };
  const auto buffer = [](const char* name, const at::Tensor& value) {
    return [name, value](torch::nn::Module& layer) { layer.named_buffers()[name].set_data(value); };
  };
  const std::vector<Case> cases = {
      {torch::randn({3})},
      {torch::randn({2, 3, 4, 5})},
      {at::Tensor()},
      {torch::randn({1, 3})},
      {torch::randn({1, 3, 1})},
      {torch::randn({5, 4})},
      {.input = torch::randn({5, 4}), .training = false},
      {torch::ones({5, 3}, at::kLong)},
      {torch::ones({5, 3}, at::kComplexFloat)},
      {torch::randn({5, 3}, at::kDouble)},
      {torch::randn({5, 3}), buffer("running_mean", torch::zeros({4}))},
      {torch::randn({5, 3}), buffer("running_var", torch::ones({3}, at::kDouble))},
      {torch::randn({5, 3}), buffer("running_mean", torch::zeros({3, 1}))},
      {.input = torch::randn({5, 3}), .eps = 0.0},
      {.input = torch::randn({5, 3}), .training = false, .eps = -1.0},
      {torch::randn({5, 3}).to_sparse()},
  };
  const auto attempt = [](auto layer, const Case& refused) {
    layer->options.eps(refused.eps);
    refused.change(*layer);
    layer->train(refused.training);
    std::vector<at::Tensor> before;
    for (const auto& tensor : layer->buffers()) before.push_back(tensor.clone());
    std::string words = "served";
    try {
      layer->forward(refused.input);
    } catch (const c10::Error& error) {
      words = error.what_without_backtrace();
      if constexpr (std::is_same_v<decltype(layer), Ours>) {
        for (std::size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(torch::equal(layer->buffers()[i], before[i]));
      }
    }
    return words;
  };
  int refusals = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const auto words = attempt(Ours(3), cases[i]);
    EXPECT_EQ(words, attempt(Theirs(3), cases[i])) << "case " << i;
    refusals += words != "served";
  }
  EXPECT_GE(refusals, 13);
}

TEST(BatchNorm1d, LeavesToTorchWhatIsNotOurs) {
  // Of an empty input torch looks at no size.
  EXPECT_EQ(Ours(3)(torch::randn({0, 4})).sizes(), Theirs(3)(torch::randn({0, 4})).sizes());
  const auto on_meta = at::TensorOptions(at::kMeta);
  const auto mean = torch::zeros({3}, on_meta);
  EXPECT_EQ(functional::batch_norm(torch::randn({5, 3}, on_meta), mean, mean.clone()).sizes(),
            at::IntArrayRef({5, 3}));
}

TEST(Functional, AgreesWithTorchsForAllOptions) {
  namespace F = torch::nn::functional;
  torch::manual_seed(3);
  for (const bool training : {true, false})
    for (const bool affine : {true, false})
      for (const auto& shape : std::vector<std::vector<int64_t>>{{6, 3}, {4, 3, 5}, {2, 3, 4, 5}}) {
        const auto x = torch::randn(shape, at::kDouble);
        F::BatchNormFuncOptions options;
        options.training(training).momentum(0.3).eps(1e-3);
        if (affine) options.weight(torch::randn({3}, at::kDouble)).bias(torch::randn({3}, at::kDouble));
        const std::array<at::Tensor, 2> means = {torch::zeros({3}, at::kDouble), torch::zeros({3}, at::kDouble)};
        const std::array<at::Tensor, 2> vars = {torch::ones({3}, at::kDouble), torch::ones({3}, at::kDouble)};
        const auto y = functional::batch_norm(x, means[0], vars[0], options);
        EXPECT_TRUE(torch::allclose(y, F::batch_norm(x, means[1], vars[1], options), 1e-12, 1e-12));
        EXPECT_TRUE(torch::allclose(means[0], means[1], 1e-12, 1e-12));
        EXPECT_TRUE(torch::allclose(vars[0], vars[1], 1e-12, 1e-12));
      }
  const auto x = torch::randn({6, 3}, at::kDouble);
  EXPECT_TRUE(torch::allclose(
      functional::batch_norm(x, {}, {}, functional::BatchNormFuncOptions().training(true).eps(1e-4)),
      F::batch_norm(x, {}, {}, F::BatchNormFuncOptions().training(true).eps(1e-4)), 1e-12, 1e-12));
}

// Module::to converts the counter too, in torch's layer as in ours.
TEST(BatchNorm1d, CountsInAnyType) {
  torch::manual_seed(6);
  for (const auto dtype : {at::kBFloat16, at::kFloat, at::kDouble})
    for (const auto& momentum : {std::optional<double>(0.1), std::optional<double>()}) {
      const auto options = torch::nn::BatchNorm1dOptions(3).momentum(momentum);
      Ours ours(options);
      Theirs theirs(options);
      ours->to(dtype);
      theirs->to(dtype);
      for (int i = 0; i < 3; ++i) {
        const auto x = torch::randn({8, 3}, dtype);
        EXPECT_NE(ours(x).grad_fn()->name().find("torch_bn"), std::string::npos);
        theirs(x);
      }
      EXPECT_TRUE(torch::equal(ours->num_batches_tracked, theirs->num_batches_tracked));
      EXPECT_TRUE(torch::allclose(ours->running_mean, theirs->running_mean, 1e-2, 1e-2));
    }
}

// The layer is ours and not torch's in disguise: its statistics keep the digits that torch's lose.
TEST(BatchNorm1d, IsExactWhateverTheMean) {
  torch::manual_seed(4);
  const auto x = torch::randn({65536, 2}) + 1e4;
  const auto wide = x.to(at::kDouble);
  Ours layer(2);
  const auto want = (wide - wide.mean(0)) / (wide.var(0, false) + 1e-5).sqrt();
  EXPECT_LT((layer(x) - want).abs().max().item<double>(), 1e-6);
}

// What a module in evaluation returns to many threads at once, and modules in training to a thread each, has the
// bits of one thread alone.
TEST(Threads, EvaluateOneModuleAndTrainTheirOwnAtOnce) {
  constexpr int kThreads = 8;
  constexpr int kRounds = 30;
  torch::manual_seed(5);
  Ours shared(33);
  for (int i = 0; i < 3; ++i) shared(torch::randn({64, 33}));
  shared->eval();
  const auto x = torch::randn({64, 33});
  const auto want = shared(x).detach();

  auto train = [&](int seed) {
    Ours own(33);
    const auto inputs = at::arange(64 * 33, at::kFloat).view({64, 33}).sin_().mul_(seed + 1);
    at::Tensor y;
    for (int round = 0; round < kRounds; ++round) {
      y = own(inputs + round);
      own->zero_grad();
      y.square().mul(inputs).sum().backward();
      const torch::NoGradGuard guard;
      own->weight.sub_(1e-4 * own->weight.grad());
    }
    return torch::cat({y.detach().flatten(), own->running_var, own->weight.detach(), own->weight.grad()});
  };
  std::vector<at::Tensor> alone;
  for (int i = 0; i < kThreads; ++i) alone.push_back(train(i));

  std::vector<int> wrong(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i)
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) wrong[i] += torch::equal(shared(x), want) ? 0 : 1;
      wrong[i] += torch::equal(train(i), alone[i]) ? 0 : 1;
    });
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(kThreads));
}

TEST(BuildInfo, TellsWhatRuns) {
  const auto info = build_info();
  EXPECT_EQ(info.torch_version.substr(0, 5), "2.13.");
  EXPECT_NE(std::find(info.isas_supported.begin(), info.isas_supported.end(), info.isa),
            info.isas_supported.end());
}

// The fused layers are their two modules in one.
template <typename Layer>
class Fused : public ::testing::Test {};
using FusedLayers = ::testing::Types<BatchNormReLU1d, ReLUBatchNorm1d>;
TYPED_TEST_SUITE(Fused, FusedLayers);

TYPED_TEST(Fused, IsTheTwoModulesAndTrainsOnFromAPlainLayersFile) {
  constexpr bool kAfter = std::is_same_v<TypeParam, BatchNormReLU1d>;
  torch::manual_seed(3);
  Ours norm(5);
  torch::nn::init::normal_(norm->weight);
  torch::nn::init::normal_(norm->bias);
  norm(torch::randn({7, 5}));
  std::stringstream file;
  torch::save(norm, file);
  TypeParam fused(5);
  torch::load(fused, file);
  for (const bool training : {true, false}) {
    fused->train(training);
    norm->train(training);
    const auto x = torch::randn({9, 5, 4}).set_requires_grad(true);
    const auto x2 = x.detach().clone().set_requires_grad(true);
    const auto g = torch::randn_like(x);
    const auto y = fused(x);
    const auto want = kAfter ? torch::relu(norm(x2)) : norm(torch::relu(x2));
    fused->zero_grad();
    norm->zero_grad();
    y.backward(g);
    want.backward(g);
    EXPECT_TRUE(same_bits(y, want));
    EXPECT_TRUE(same_bits(x.grad(), x2.grad()));
    EXPECT_TRUE(same_bits(fused->weight.grad(), norm->weight.grad()));
    EXPECT_TRUE(same_bits(fused->bias.grad(), norm->bias.grad()));
    expect_same_state(*fused, *norm);
  }
}

TYPED_TEST(Fused, BehavesAsAModule) {
  TypeParam layer(BatchNorm1dOptions(3).eps(0.5).momentum(std::nullopt));
  std::stringstream printed;
  printed << layer;
  EXPECT_NE(printed.str().find("ReLU"), std::string::npos);
  EXPECT_NE(printed.str().find("1d(3, eps=0.5, momentum=None, affine=true"), std::string::npos);
  torch::nn::Sequential net(torch::nn::Linear(4, 3), layer);
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  const auto x = torch::randn({6, 4});
  EXPECT_TRUE(same_bits(net->forward(x), copy->forward(x)));
  EXPECT_THROW(layer(torch::ones({1, 3})), c10::Error);
  EXPECT_EQ(layer->num_batches_tracked.template item<int64_t>(), 1);
}

TEST(FusedFunctional, IsTheTwoFunctions) {
  const auto options = functional::BatchNormFuncOptions().weight(torch::rand({5})).training(true);
  const auto x = torch::randn({8, 5});
  const at::Tensor none;
  EXPECT_TRUE(same_bits(functional::batch_norm_relu(x, none, none, options),
                        torch::relu(functional::batch_norm(x, none, none, options))));
  EXPECT_TRUE(same_bits(functional::relu_batch_norm(x, none, none, options),
                        functional::batch_norm(torch::relu(x), none, none, options)));
  // An integer input is refused with torch's words, whichever function gets it.
  EXPECT_THROW(functional::relu_batch_norm(torch::ones({4, 5}, at::kLong), none, none, options), c10::Error);
}

}  // namespace
}  // namespace torch_bn::testing
