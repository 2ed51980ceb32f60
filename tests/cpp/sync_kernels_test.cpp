// The kernels of several processes: one share gives the bits of the ordinary kernels, several give the same bits
// in every process, on every instruction set, number of threads and layout; with a ReLU those of the two modules.
#include <gtest/gtest.h>

#include "kernels/dispatch.h"
#include "shares.h"

namespace torch_bn::testing {
namespace {

class SyncKernels : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& table() const { return *find_isa(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Isa, SyncKernels, ::testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return info.param; });

constexpr Relu kRelus[] = {Relu::none, Relu::after, Relu::before};

template <typename T>
std::vector<Problem<T>> problems() {
  std::vector<Problem<T>> all;
  for (const Shape& shape : kShapes)
    for (const Relu relu : kRelus) {
      if constexpr (sizeof(T) == 2)
        all.emplace_back(shape, 0.0, 1.0, small_numbers<T>);
      else
        all.emplace_back(shape, 3.0, 2.0);
      all.back().relu = relu;
    }
  return all;
}

// Unequal, one of them empty.
std::vector<int64_t> three_shares(int64_t n) {
  return {n / 3, 0, n - n / 3};
}

template <typename T>
void expect_the_ordinary_bits(const KernelTable& table) {
  for (Problem<T>& problem : problems<T>())
    for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
      const auto want = problem.run(table, 1, layout);
      const auto got = SharedRun<T>(problem, {0, problem.shape.n}, table, 2, layout).run();
      EXPECT_TRUE(same_bits(got.output, want.output)) << problem.shape.n << "x" << problem.shape.c;
      EXPECT_TRUE(same_bits(got.grad_input, want.grad_input)) << problem.shape.n << "x" << problem.shape.c;
      for (const auto process : {0, 1}) {
        EXPECT_TRUE(same_bits(got.mean[process], want.mean));
        EXPECT_TRUE(same_bits(got.invstd[process], want.invstd));
        EXPECT_TRUE(same_bits(got.running_mean[process], want.running_mean));
        EXPECT_TRUE(same_bits(got.running_var[process], want.running_var));
      }
    }
}

TEST_P(SyncKernels, OneShareGivesTheOrdinaryBits) {
  expect_the_ordinary_bits<float>(table());
  expect_the_ordinary_bits<double>(table());
  expect_the_ordinary_bits<BFloat16Bits>(table());
  expect_the_ordinary_bits<Float16Bits>(table());
}

template <typename T>
void expect_the_same_bits_everywhere(const KernelTable& table) {
  const KernelTable& base = *find_isa(supported_isas().front());
  for (const Problem<T>& problem : problems<T>()) {
    const auto shares = three_shares(problem.shape.n);
    const auto want = SharedRun<T>(problem, shares, base).run();
    for (const std::size_t process : {1, 2}) {
      EXPECT_TRUE(same_bits(want.mean[process], want.mean[0]));
      EXPECT_TRUE(same_bits(want.invstd[process], want.invstd[0]));
      EXPECT_TRUE(same_bits(want.running_mean[process], want.running_mean[0]));
      EXPECT_TRUE(same_bits(want.running_var[process], want.running_var[0]));
    }
    for (const int threads : {1, 3})
      EXPECT_TRUE(SharedRun<T>(problem, shares, table, threads).run().same(want))
          << problem.shape.n << "x" << problem.shape.c << "x" << problem.shape.l;
    EXPECT_TRUE(SharedRun<T>(problem, shares, table, 2, Layout::padded_rows).run().same(want))
        << problem.shape.n << "x" << problem.shape.c << "x" << problem.shape.l;
  }
}

TEST_P(SyncKernels, TheSameBitsOnEveryInstructionSet) {
  expect_the_same_bits_everywhere<float>(table());
  expect_the_same_bits_everywhere<double>(table());
  expect_the_same_bits_everywhere<BFloat16Bits>(table());
  expect_the_same_bits_everywhere<Float16Bits>(table());
}

// Numbers whose statistics, in three shares or together, and whose gradients are exact.
TEST_P(SyncKernels, SeveralSharesAreOneBatch) {
  Problem<float> problem({8, 3, 1}, 0.0, 1.0);
  problem.eps = 0.0;
  for (std::size_t i = 0; i < problem.x.size(); ++i) {
    problem.x[i] = (i / 3) % 2 == 0 ? 1.0F : -3.0F;  // mean -1, variance 4
    problem.g[i] = static_cast<float>(static_cast<int>(i % 5) - 2);
    problem.weight[i % 3] = 2.0F;
    problem.bias[i % 3] = 0.5F;
  }
  for (const Relu relu : {Relu::none, Relu::after}) {
    problem.relu = relu;
    const auto want = problem.run(table());
    for (const auto& shares : {std::vector<int64_t>{4, 4}, {2, 0, 6}, {2, 2, 2, 2}}) {
      const auto got = SharedRun<float>(problem, shares, table()).run();
      EXPECT_EQ(got.output, want.output);
      EXPECT_EQ(got.grad_input, want.grad_input);
      EXPECT_EQ(got.mean[0], want.mean);
      EXPECT_EQ(got.running_var[0], want.running_var);
    }
  }
}

}  // namespace
}  // namespace torch_bn::testing
