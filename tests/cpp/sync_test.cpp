// SyncBatchNorm1d in C++: two members of a group, here two threads with a backend that exchanges in memory.
#include <ATen/ThreadLocalPythonObjects.h>
#include <gtest/gtest.h>
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>

#include <atomic>
#include <barrier>
#include <stdexcept>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/HashStore.hpp>

namespace {

constexpr int kMembers = 2;

using Objects = at::impl::ThreadLocalPythonObjects;
constexpr const char* kKey = "context";  // torch's own, during every backward

// What the members share.
struct Meeting {
  std::atomic<int> python_objects = 0;  // how often the caller's state had one
  std::barrier<> barrier{kMembers};
  std::array<at::Tensor, kMembers> said;
};

class Done : public c10d::Work {
 public:
  explicit Done(const at::Tensor& result) : result_{result} {}
  bool isCompleted() override { return true; }
  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
  std::vector<at::Tensor> result() override { return result_; }

 private:
  std::vector<at::Tensor> result_;
};

class InMemory : public c10d::Backend {
 public:
  InMemory(int rank, std::shared_ptr<Meeting> meeting) : Backend(rank, kMembers), meeting_(std::move(meeting)) {}
  const std::string getBackendName() const override { return "in_memory"; }
  c10::intrusive_ptr<Options> getBackendOptions() override {
    return c10::make_intrusive<Options>("in_memory", std::chrono::milliseconds(5000));
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& /*options*/) override {
    meeting_->python_objects += Objects::contains(kKey);
    meeting_->said[getRank()] = input;
    meeting_->barrier.arrive_and_wait();
    output.copy_(at::cat(std::vector<at::Tensor>(meeting_->said.begin(), meeting_->said.end())).view_as(output));
    meeting_->barrier.arrive_and_wait();
    return c10::make_intrusive<Done>(output);
  }

 private:
  std::shared_ptr<Meeting> meeting_;
};

// Runs member(rank, group name) in two threads.
template <typename Member>
std::shared_ptr<Meeting> together(Member member, const c10::intrusive_ptr<c10d::Store>& store) {
  auto meeting = std::make_shared<Meeting>();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kMembers; ++rank)
    threads.emplace_back([=] {
      // A process knows its group by one name; two members in one process need two.
      const std::string name = "member " + std::to_string(rank);
      auto group = store ? c10::make_intrusive<c10d::ProcessGroup>(store, rank, kMembers)
                         : c10::make_intrusive<c10d::ProcessGroup>(rank, kMembers);
      group->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::CUSTOM,
                        c10::make_intrusive<InMemory>(rank, meeting));
      group->setDefaultBackend(c10d::ProcessGroup::BackendType::CUSTOM);
      group->setGroupName(name);
      c10d::register_process_group(name, group);
      member(rank, name);
      c10d::unregister_process_group(name);
    });
  for (auto& thread : threads) thread.join();
  return meeting;
}

template <typename Member>
std::shared_ptr<Meeting> together(Member member) {
  return together(member, c10::make_intrusive<c10d::HashStore>());
}

// The store of a process that has ended.
class StoreThatIsGone : public c10d::HashStore {
 public:
  void set(const std::string& /*key*/, const std::vector<uint8_t>& /*value*/) override { fail(); }
  bool check(const std::vector<std::string>& /*keys*/) override { fail(); }

 private:
  [[noreturn]] static void fail() { throw std::runtime_error("connection reset by peer"); }
};

TEST(SyncBatchNorm1d, TwoMembersAreOneLayerWithTheWholeBatch) {
  torch::manual_seed(0);
  const auto x = torch::randn({20, 7}, torch::kDouble) + 5;
  const auto g = torch::randn({20, 7}, torch::kDouble);
  torch_bn::BatchNorm1d whole(7);
  whole->to(torch::kDouble);
  whole->num_batches_tracked = whole->num_batches_tracked.to(torch::kLong);
  auto all = x.clone().requires_grad_();
  auto want = whole->forward(all);
  want.backward(g);
  std::array<at::Tensor, kMembers> outputs;
  std::array<at::Tensor, kMembers> gradients;
  std::array<at::Tensor, kMembers> weights;
  std::array<at::Tensor, kMembers> variances;
  together([&](int rank, const std::string& group) {
    const auto begin = rank == 0 ? 0 : 13;
    const auto end = rank == 0 ? 13 : 20;
    torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(7), group, "bn");
    layer->to(torch::kDouble);  // the counter too
    auto own = x.slice(0, begin, end).clone().requires_grad_();
    auto y = layer->forward(own);
    y.backward(g.slice(0, begin, end));
    outputs[rank] = y.detach();
    gradients[rank] = own.grad();
    weights[rank] = layer->weight.grad();
    variances[rank] = layer->running_var;
    EXPECT_EQ(layer->num_batches_tracked.item<double>(), 1);
  });
  // The same sums of 20 numbers in float64, in another order.
  EXPECT_TRUE(torch::allclose(torch::cat({outputs[0], outputs[1]}), want, 1e-12, 1e-12));
  EXPECT_TRUE(torch::allclose(torch::cat({gradients[0], gradients[1]}), all.grad(), 1e-12, 1e-12));
  EXPECT_TRUE(torch::allclose(weights[0] + weights[1], whole->weight.grad(), 1e-12, 1e-12));
  EXPECT_TRUE(torch::allclose(variances[0], whole->running_var, 1e-12, 1e-12));
  EXPECT_TRUE(torch::equal(variances[0], variances[1]));
}

template <typename Layer>
void expect_the_bits_of_two_modules(bool relu_first) {
  torch::manual_seed(0);
  const auto x = torch::randn({20, 7});
  const auto g = torch::randn({20, 7});
  together([&](int rank, const std::string& group) {
    Layer layer(torch_bn::BatchNorm1dOptions(7), group, "fused");
    torch_bn::SyncBatchNorm1d norm(torch_bn::BatchNorm1dOptions(7), group, "norm");
    auto one = x.slice(0, 13 * rank, rank == 0 ? 13 : 20).clone().requires_grad_();
    auto two = one.detach().clone().requires_grad_();
    const auto fused = layer->forward(one);
    const auto want = relu_first ? norm->forward(torch::relu(two)) : torch::relu(norm->forward(two));
    EXPECT_TRUE(torch::equal(fused, want));
    const auto own = g.slice(0, 13 * rank, rank == 0 ? 13 : 20);
    fused.backward(own);
    want.backward(own);
    EXPECT_TRUE(torch::equal(one.grad(), two.grad()));
    EXPECT_TRUE(torch::equal(layer->weight.grad(), norm->weight.grad()));
    EXPECT_TRUE(torch::equal(layer->running_var, norm->running_var));
    layer->eval();
    norm->eval();
    EXPECT_TRUE(torch::equal(layer->forward(one),
                             relu_first ? norm->forward(torch::relu(two)) : torch::relu(norm->forward(two))));
  });
}

TEST(SyncBatchNorm1d, WithAReluItIsTheTwoModules) {
  expect_the_bits_of_two_modules<torch_bn::SyncBatchNormReLU1d>(/*relu_first=*/false);
  expect_the_bits_of_two_modules<torch_bn::SyncReLUBatchNorm1d>(/*relu_first=*/true);
}

class WithAndWithoutStore : public ::testing::TestWithParam<bool> {};

// Groups of MPI have no store: there the members agree by the backend.
INSTANTIATE_TEST_SUITE_P(SyncBatchNorm1d, WithAndWithoutStore, ::testing::Bool());

TEST_P(WithAndWithoutStore, MembersThatDifferThrowBoth) {
  const auto member = [](int rank, const std::string& group) {
    torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(5).momentum(rank == 0 ? 0.1 : 0.2), group, "bn");
    try {
      layer->forward(torch::randn({4, 5}));
      ADD_FAILURE() << "it went on";
    } catch (const c10::Error& error) {
      const std::string words = error.what();
      EXPECT_NE(words.find("SyncBatchNorm1d 'bn': the processes of group"), std::string::npos) << words;
      EXPECT_NE(words.find("momentum 0.2"), std::string::npos) << words;
    }
    torch_bn::SyncBatchNorm1d same(torch_bn::BatchNorm1dOptions(5), group, "bn");
    EXPECT_NO_THROW(same->forward(torch::randn({4, 5})));
  };
  c10::intrusive_ptr<c10d::Store> store;
  if (GetParam()) store = c10::make_intrusive<c10d::HashStore>();
  together(member, store);
}

TEST(SyncBatchNorm1d, OptionsThatItHasNotAreRefused) {
  const torch_bn::BatchNorm1dOptions plain(5);
  for (const auto& options : {torch_bn::BatchNorm1dOptions(plain).channels_last(true),
                              torch_bn::BatchNorm1dOptions(plain).virtual_batch_size(2)}) {
    torch_bn::SyncBatchNorm1d layer(options, "group", "bn");
    try {
      layer->forward(torch::randn({4, 5, 5}));
      ADD_FAILURE() << "it went on";
    } catch (const c10::Error& error) {
      EXPECT_NE(std::string(error.what()).find("neither virtual_batch_size nor channels_last"), std::string::npos);
    }
  }
}

TEST(SyncBatchNorm1d, AStoreThatIsGoneIsAProcessThatDidNotCome) {
  const auto member = [](int /*rank*/, const std::string& group) {
    torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(5), group, "bn");
    try {
      layer->forward(torch::randn({4, 5}));
      ADD_FAILURE() << "it went on";
    } catch (const c10::Error& error) {
      const std::string words = error.what();
      EXPECT_NE(words.find("SyncBatchNorm1d 'bn': another process of group '" + group + "' did not come"),
                std::string::npos)
          << words;
    }
    EXPECT_EQ(layer->num_batches_tracked.item<int64_t>(), 0);
  };
  together(member, c10::make_intrusive<StoreThatIsGone>());
}

TEST(SyncBatchNorm1d, GradientsHaveTheShapesOfTheParameters) {
  torch::manual_seed(0);
  const auto x = torch::randn({20, 7});
  const auto g = torch::randn({20, 7});
  together([&](int rank, const std::string& group) {
    torch_bn::SyncBatchNorm1d flat(torch_bn::BatchNorm1dOptions(7), group, "flat");
    torch_bn::SyncBatchNorm1d deep(torch_bn::BatchNorm1dOptions(7), group, "deep");
    deep->weight = torch::ones({7, 1}).requires_grad_();
    deep->bias = torch::zeros({1, 7}).requires_grad_();
    for (auto* layer : {&flat, &deep})
      (*layer)->forward(x.slice(0, 10 * rank, 10 * rank + 10)).backward(g.slice(0, 10 * rank, 10 * rank + 10));
    EXPECT_EQ(deep->weight.grad().sizes(), (std::vector<int64_t>{7, 1}));
    EXPECT_EQ(deep->bias.grad().sizes(), (std::vector<int64_t>{1, 7}));
    EXPECT_TRUE(torch::equal(deep->weight.grad().flatten(), flat->weight.grad()));
    EXPECT_TRUE(torch::equal(deep->bias.grad().flatten(), flat->bias.grad()));
  });
}

template <typename Layer>
void expect_a_copy_to_be_the_layer(const std::string& name) {
  together([&](int rank, const std::string& group) {
    Layer layer(torch_bn::BatchNorm1dOptions(2), group, "bn");
    const auto copy = std::dynamic_pointer_cast<typename Layer::ContainedType>(layer->clone());
    const auto x = torch::tensor({{1.0F, 2.0F}, {rank + 3.0F, 7.0F}});
    EXPECT_TRUE(torch::equal(layer->forward(x), copy->forward(x)));
    EXPECT_TRUE(torch::equal(layer->running_var, copy->running_var));
    std::ostringstream printed;
    printed << *copy;
    EXPECT_EQ(printed.str(),
              "torch_bn::" + name + "(2, eps=1e-05, momentum=0.1, affine=true, track_running_stats=true)");
  });
}

TEST(SyncBatchNorm1d, CopiesAreTheLayer) {
  expect_a_copy_to_be_the_layer<torch_bn::SyncBatchNorm1d>("SyncBatchNorm1d");
  expect_a_copy_to_be_the_layer<torch_bn::SyncBatchNormReLU1d>("SyncBatchNormReLU1d");
  expect_a_copy_to_be_the_layer<torch_bn::SyncReLUBatchNorm1d>("SyncReLUBatchNorm1d");
}

// What it says of members that differ in their momentum.
std::string refusal(torch_bn::SyncBatchNorm1dImpl& layer, int rank) {
  layer.options.momentum(rank == 0 ? 0.1 : 0.2);
  try {
    layer.forward(torch::randn({4, 5}));
    return "none";
  } catch (const c10::Error& error) {
    return error.what();
  }
}

TEST(SyncBatchNorm1d, TheFirstForwardTellsTheSettingsAndOnRequestEvery) {
  const auto tells = [](const std::string& words) { return words.find("momentum 0.2") != std::string::npos; };
  const auto member = [&](bool of_a_copy, bool told) {
    return [=](int rank, const std::string& group) {
      torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(5), group, "bn");
      layer->forward(torch::randn({4, 5}));
      const auto copy = std::dynamic_pointer_cast<torch_bn::SyncBatchNorm1dImpl>(layer->clone());
      const std::string words = refusal(of_a_copy ? *copy : *layer, rank);
      EXPECT_EQ(tells(words), told) << words;
      EXPECT_NE(words, "none");
    };
  };
  together(member(/*of_a_copy=*/false, /*told=*/false));
  together(member(/*of_a_copy=*/true, /*told=*/true));
  setenv("TORCH_BN_SYNC_DEBUG", "1", 1);
  together(member(/*of_a_copy=*/false, /*told=*/true));
  setenv("TORCH_BN_SYNC_DEBUG", "0", 1);
  together(member(/*of_a_copy=*/false, /*told=*/false));
  unsetenv("TORCH_BN_SYNC_DEBUG");
}

// A backend's thread keeps the caller's state: with Python's objects in it, it could be the last to free them.
TEST(SyncBatchNorm1d, CollectivesSeeNoObjectsOfPython) {
  const auto meeting = together([](int /*rank*/, const std::string& group) {
    torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(5), group, "bn");
    auto x = torch::randn({4, 5}).requires_grad_();
    Objects::set(kKey, nullptr);
    layer->forward(x).sum().backward();
    EXPECT_TRUE(Objects::contains(kKey));
    Objects::erase(kKey);
  });
  EXPECT_EQ(meeting->python_objects, 0);
}

TEST(SyncBatchNorm1d, AloneAndInEvaluationItIsTheOrdinaryLayer) {
  torch::manual_seed(0);
  torch_bn::SyncBatchNorm1d layer(torch_bn::BatchNorm1dOptions(5));
  torch_bn::BatchNorm1d ordinary(5);
  const auto x = torch::randn({6, 5});
  EXPECT_TRUE(torch::equal(layer->forward(x), ordinary->forward(x)));
  layer->eval();
  ordinary->eval();
  EXPECT_TRUE(torch::equal(layer->forward(x), ordinary->forward(x)));
  torch_bn::SyncBatchNorm1d nowhere(torch_bn::BatchNorm1dOptions(5), "no such group");
  EXPECT_THROW(nowhere->forward(x), c10::Error);
  nowhere->eval();
  EXPECT_NO_THROW(nowhere->forward(x));
}

}  // namespace
