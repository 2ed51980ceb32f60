// The fused kernels do what batch norm and torch's ReLU do one after the other, to the last bit: forward,
// backward, and the mask for every element, in channels within and beyond the range of float32 arithmetic.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/dispatch.h"
#include "problem.h"
#include "reference.h"

namespace torch_bn::testing {
namespace {

class FusedRelu : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& table() const { return *find_isa(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Isa, FusedRelu, ::testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return info.param; });

// What torch's relu tells apart: negative numbers, zeros of both signs (which stay), NaN (which stays).
bool is_negative(float x) {
  return x < 0;
}
bool is_negative(double x) {
  return x < 0;
}
template <typename Bits>
bool is_negative(Bits x) {
  const int infinity = dtype_of<Bits> == DType::bf16 ? 0x7f80 : 0x7c00;
  const int magnitude = x.bits & 0x7fff;
  return (x.bits & 0x8000) != 0 && magnitude != 0 && magnitude <= infinity;
}
bool is_zero(float x) {
  return x == 0;
}
bool is_zero(double x) {
  return x == 0;
}
template <typename Bits>
bool is_zero(Bits x) {
  return (x.bits & 0x7fff) == 0;
}

template <typename T>
std::vector<T> relu_of(std::vector<T> values) {
  for (T& value : values)
    if (is_negative(value)) value = T{};
  return values;
}

// The gradients where `x`, given to a ReLU, is positive or NaN; zero elsewhere.
template <typename T>
std::vector<T> passed_by(const std::vector<T>& x, std::vector<T> gradients) {
  for (std::size_t i = 0; i < x.size(); ++i)
    if (is_negative(x[i]) || is_zero(x[i])) gradients[i] = T{};
  return gradients;
}

// Equal bits, but for the sign of a zero: a negative 16-bit result may vanish before the ReLU or after it.
template <typename T>
bool same_but_zeros(const std::vector<T>& a, const std::vector<T>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(T)) != 0 && !(is_zero(a[i]) && is_zero(b[i]))) return false;
  return a.size() == b.size();
}

template <typename T>
void expect_the_two_modules(const KernelTable& table, const Problem<T>& problem, int threads, Layout layout,
                            bool training) {
  Problem<T> plain = problem;
  const auto normalised = plain.run(table, 1, layout, training).output;
  Problem<T> fused = problem;
  fused.relu = Relu::after;
  const auto after = fused.run(table, threads, layout, training);
  plain.g = passed_by(normalised, problem.g);
  auto want = plain.run(table, 1, layout, training);
  want.output = relu_of(normalised);
  EXPECT_TRUE(same_but_zeros(after.output, want.output)) << "after";
  want.output = after.output;
  EXPECT_TRUE(after.same(want)) << "after";

  fused.relu = Relu::before;
  const auto before = fused.run(table, threads, layout, training);
  plain.g = problem.g;
  plain.x = relu_of(problem.x);
  want = plain.run(table, 1, layout, training);
  want.grad_input = passed_by(problem.x, want.grad_input);
  EXPECT_TRUE(same_bits(before.output, want.output)) << "before, output";
  EXPECT_TRUE(before.same(want)) << "before";
}

template <typename T, typename Draw>
void expect_on_all_shapes(const KernelTable& table, Draw draw) {
  for (const Shape& shape : kShapes)
    for (const bool training : {true, false})
      for (const Layout layout :
           {Layout::contiguous, Layout::channels_last, Layout::transposed, Layout::padded_rows}) {
        SCOPED_TRACE(::testing::Message() << shape.n << "x" << shape.c << "x" << shape.l << " layout "
                                          << static_cast<int>(layout) << (training ? " train" : " eval"));
        expect_the_two_modules(table, Problem<T>(shape, 0.5, 2.0, draw), 3, layout, training);
      }
}

TEST_P(FusedRelu, IsTheTwoModulesInFloat32) {
  expect_on_all_shapes<float>(table(), normal<float>);
}
TEST_P(FusedRelu, IsTheTwoModulesInFloat64) {
  expect_on_all_shapes<double>(table(), normal<double>);
}
TEST_P(FusedRelu, IsTheTwoModulesInBFloat16) {
  expect_on_all_shapes<BFloat16Bits>(table(), small_numbers<BFloat16Bits>);
}
TEST_P(FusedRelu, IsTheTwoModulesInFloat16) {
  expect_on_all_shapes<Float16Bits>(table(), small_numbers<Float16Bits>);
}

// Some channels take double for what others do in float32, in the forward or the backward. There the fused
// backward may take double where the two modules do not, so that the last bits differ; the mask must not.
TEST_P(FusedRelu, HasTheMaskOfTheForwardBeyondTheRangeOfFloat32) {
  for (const Shape& shape : {Shape{130, 70, 1}, Shape{5, 6, 40}, Shape{9, 4, 7}})
    for (const bool training : {true, false}) {
      Problem<float> problem(shape, 0.5, 2.0);
      const float scales[] = {1e30F, 1e-30F, 1e-40F, 1.0F, 1e36F};
      for (int64_t n = 0; n < shape.n; ++n)
        for (int64_t c = 0; c < shape.c; ++c)
          for (int64_t l = 0; l < shape.l; ++l) problem.x[at(shape, n, c, l)] *= scales[c % 5];
      problem.weight[2] = 1e35F;
      problem.weight[3] = 1e-42F;
      problem.bias[1] = -1e33F;
      std::fill(problem.g.begin(), problem.g.end(), 1.0F);
      const auto normalised = problem.run(table(), 1, Layout::contiguous, training).output;
      problem.relu = Relu::after;
      const auto fused = problem.run(table(), 3, Layout::contiguous, training);
      EXPECT_TRUE(same_bits(fused.output, relu_of(normalised)));
      EXPECT_TRUE(fused.same(problem.run(table(), 1, Layout::contiguous, training)));  // in wider tiles
      Problem<float> plain = problem;
      plain.relu = Relu::none;
      plain.g = passed_by(normalised, problem.g);
      const auto want = plain.run(table(), 1, Layout::contiguous, training);
      for (int64_t c = 0; c < shape.c; ++c) {
        // The gradients are ones, so their sum counts the elements that pass, exactly.
        EXPECT_EQ(fused.grad_bias[c], want.grad_bias[c]) << c;
        float largest = 0;
        for (int64_t n = 0; n < shape.n; ++n)
          for (int64_t l = 0; l < shape.l; ++l)
            largest = std::fmax(largest, std::fabs(want.grad_input[at(shape, n, c, l)]));
        for (int64_t n = 0; n < shape.n; ++n)
          for (int64_t l = 0; l < shape.l; ++l) {
            const float a = fused.grad_input[at(shape, n, c, l)];
            const float b = want.grad_input[at(shape, n, c, l)];
            // Four roundings to float32 on the way, of terms no larger than a few times the largest result; and
            // the smallest number that float32 has.
            if (std::isfinite(b)) {
              ASSERT_NEAR(a, b, 1e-6F * largest + 2e-45F) << c;
            } else {
              ASSERT_FALSE(std::isfinite(a)) << c;
            }
          }
      }
    }
}

// x - mean is one of -1, 0, 1, and the bias moves the zero of y onto each: zeros block the gradient.
TEST_P(FusedRelu, BlocksTheGradientAtZero) {
  const Shape shape{96, 48, 1};
  Problem<float> problem(shape, 0, 1);
  problem.eps = 1.0 / 3;  // the variance is 2/3
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c) problem.x[at(shape, n, c, 0)] = static_cast<float>(n % 3 - 1);
  for (int64_t c = 0; c < shape.c; ++c) {
    problem.weight[c] = 1;
    problem.bias[c] = static_cast<float>(c % 3 - 1);
  }
  std::fill(problem.g.begin(), problem.g.end(), 1.0F);
  problem.relu = Relu::after;
  const auto results = problem.run(table());
  for (int64_t c = 0; c < shape.c; ++c) {
    int64_t positive = 0;
    for (int64_t n = 0; n < shape.n; ++n) positive += n % 3 - 1 + c % 3 - 1 > 0 ? 1 : 0;
    ASSERT_EQ(results.invstd[c], 1.0);
    EXPECT_EQ(results.grad_bias[c], static_cast<float>(positive)) << c;
  }
  // Before the norm, x itself decides.
  problem.relu = Relu::before;
  problem.g = normal<float>(problem.g.size(), 0, 1, 2);
  const auto before = problem.run(table());
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c)
      EXPECT_EQ(before.grad_input[at(shape, n, c, 0)] != 0.0F, n % 3 - 1 > 0) << n << " " << c;
}

TEST_P(FusedRelu, PassesNaN) {
  const Shape shape{40, 20, 1};
  for (const Relu relu : {Relu::after, Relu::before}) {
    Problem<float> problem(shape, 0, 1);
    problem.relu = relu;
    problem.x[at(shape, 7, 5, 0)] = std::numeric_limits<float>::quiet_NaN();
    const auto results = problem.run(table());
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t c = 0; c < shape.c; ++c) EXPECT_EQ(std::isnan(results.output[at(shape, n, c, 0)]), c == 5);
    // As behind torch's two modules, the gradient of a NaN is not blocked.
    EXPECT_TRUE(std::isnan(results.grad_input[at(shape, 7, 5, 0)]));
  }
}

TEST_P(FusedRelu, BitsDoNotDependOnThreadsOrInstructionSet) {
  for (const Relu relu : {Relu::after, Relu::before})
    for (const Shape& shape : kShapes)
      for (const bool training : {true, false}) {
        Problem<float> problem(shape, 0.5, 2.0);
        problem.relu = relu;
        SCOPED_TRACE(::testing::Message() << shape.n << "x" << shape.c << "x" << shape.l);
        const auto want = problem.run(*find_isa(supported_isas().front()), 1, Layout::contiguous, training);
        for (const int threads : {1, 2, 3, 4, 8})
          EXPECT_TRUE(want.same(problem.run(table(), threads, Layout::contiguous, training))) << threads;
        problem.stream_from = 0;
        EXPECT_TRUE(want.same(problem.run(table(), 2, Layout::contiguous, training)));
      }
}

}  // namespace
}  // namespace torch_bn::testing
