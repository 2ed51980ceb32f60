// The torch-free kernels, for every instruction set that this processor has.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/dispatch.h"
#include "problem.h"
#include "reference.h"

namespace torch_bn::testing {
namespace {

using namespace torch_bn::kernels;

class Kernels : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& table() const { return *find_isa(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Isa, Kernels, ::testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return info.param; });

TEST_P(Kernels, TheForcedSetIsTheOneThatRuns) {
  EXPECT_EQ(GetParam(), table().isa);
}

TEST_P(Kernels, TrainingAgreesWithTheDefinitionInFloat32) {
  for (const Shape& shape : kShapes)
    for (const double mean : {0.0, 1e4}) {
      Problem<float> problem(shape, mean, 1.0);
      const auto got = problem.run(table());
      const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
      // Sums in double leave the one rounding to float32, 2^-24 = 6e-8, and nearly nothing else. What is done
      // element by element is rounded four times: the centred value, the scale, their product, the sum.
      const double bound = 6.1e-8;
      const double elementwise_bound = 2.5e-7;
      SCOPED_TRACE(::testing::Message() << shape.n << "x" << shape.c << "x" << shape.l << " mean " << mean);
      EXPECT_LE(error(got.output, want.output), elementwise_bound);
      EXPECT_LE(error(got.grad_weight, want.grad_weight), bound);
      EXPECT_LE(error(got.grad_bias, want.grad_bias), bound);
      // grad_input may cancel altogether (two rows), so its scale is that of its terms.
      double scale = 0;
      for (int64_t n = 0; n < shape.n; ++n)
        for (int64_t c = 0; c < shape.c; ++c)
          for (int64_t l = 0; l < shape.l; ++l)
            scale = std::fmax(scale, std::fabs(static_cast<double>(problem.weight[c] * want.invstd[c]) *
                                               problem.g[at(shape, n, c, l)]));
      double worst = 0;
      for (std::size_t i = 0; i < elements(shape); ++i)
        worst = std::fmax(worst, std::fabs(static_cast<double>(got.grad_input[i] - want.grad_input[i])));
      EXPECT_LE(worst / scale, elementwise_bound);
      const auto rows = static_cast<double>(shape.n * shape.l);
      for (int64_t c = 0; c < shape.c; ++c) {
        const auto mean_c = static_cast<double>(want.mean[c]);
        const double unbiased = static_cast<double>(want.var[c]) * rows / (rows - 1);
        const double old_mean = problem.bias[c];
        const double old_var = std::fabs(static_cast<double>(problem.weight[c]));
        EXPECT_FLOAT_EQ(got.running_mean[c], static_cast<float>(0.75 * old_mean + 0.25 * mean_c));
        EXPECT_FLOAT_EQ(got.running_var[c], static_cast<float>(0.75 * old_var + 0.25 * unbiased));
      }
    }
}

TEST_P(Kernels, TrainingAgreesWithTheDefinitionInFloat64) {
  for (const Shape& shape : kShapes)
    for (const double mean : {0.0, 1e4}) {
      Problem<double> problem(shape, mean, 1.0);
      const auto got = problem.run(table());
      const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
      // The mean's own rounding is eps * |mean|; sums over blocks of 128 add some tens of roundings.
      const double bound = 1e-14 * (1 + mean);
      SCOPED_TRACE(::testing::Message() << shape.n << "x" << shape.c << "x" << shape.l << " mean " << mean);
      EXPECT_LE(error(got.output, want.output), bound);
      EXPECT_LE(error(got.mean, want.mean), 1e-14);
      EXPECT_LE(error(got.invstd, want.invstd), bound);
      EXPECT_LE(error(got.grad_weight, want.grad_weight), bound);
      EXPECT_LE(error(got.grad_bias, want.grad_bias), 1e-14);
    }
}

// Pairs that cancel but for 2^-30 leave a mean far below the data: it is right to its own last bits, which
// sums of doubles cannot give.
TEST_P(Kernels, ACancellingMeanIsRightInFloat64) {
  const Shape shape{20000, 3, 1};
  Problem<double> problem(shape, 0, 1);
  for (int64_t n = 0; n < shape.n; n += 2)
    for (int64_t c = 0; c < shape.c; ++c) {
      double& first = problem.x[at(shape, n, c, 0)];
      problem.x[at(shape, n + 1, c, 0)] = 0x1p-30 - first;
      first = 0x1p-30 - problem.x[at(shape, n + 1, c, 0)];  // now the pair's sum is exact
    }
  const auto got = problem.run(table());
  for (int64_t c = 0; c < shape.c; ++c) EXPECT_EQ(got.mean[c], 0x1p-31);
}

// A number that comes first, and vanishes beside the next ones, is all that is left of their sum.
TEST_P(Kernels, ASmallFirstNumberIsNotLostInFloat64) {
  Problem<double> problem({4, 3, 1}, 0, 1);
  const double column[] = {0x1p-70, 1, -1, 0};
  for (std::size_t i = 0; i < problem.x.size(); ++i) problem.x[i] = column[i / 3];
  const auto got = problem.run(table());
  for (int64_t c = 0; c < 3; ++c) EXPECT_EQ(got.mean[c], 0x1p-72);
}

// x[2i] + x[2i+1] = 2 mean on a dyadic grid: every partial sum is exact, so the results are too, in any order.
TEST_P(Kernels, ExactDataGiveExactStatistics) {
  for (const int64_t rows : {2, 64, 128, 130, 8192, 20000}) {
    const Shape shape{rows, 37, 1};
    Problem<float> problem(shape, 0, 1);
    problem.eps = 0.75;
    for (int64_t n = 0; n < rows; ++n)
      for (int64_t c = 0; c < shape.c; ++c) {
        const float centre = static_cast<float>(c - 18) * 64;
        // Distances 0.5 from the mean: variance 0.25, and invstd = 1 with eps = 0.75.
        problem.x[at(shape, n, c, 0)] = centre + (n % 2 == 0 ? 0.5F : -0.5F);
      }
    const auto got = problem.run(table());
    for (int64_t c = 0; c < shape.c; ++c) {
      EXPECT_EQ(got.mean[c], static_cast<double>(c - 18) * 64);
      EXPECT_EQ(got.invstd[c], 1.0);
      for (int64_t n = 0; n < rows; ++n)
        ASSERT_EQ(got.output[at(shape, n, c, 0)],
                  static_cast<float>((n % 2 == 0 ? 0.5 : -0.5) * problem.weight[c] + problem.bias[c]));
    }
  }
}

TEST_P(Kernels, AConstantChannelGivesExactlyTheBias) {
  for (const float constant : {0.0F, 0.1F, -1e8F, 3e38F, 1e-38F, 1e-42F})
    for (const int64_t rows : {2, 3, 129, 9001}) {
      const Shape shape{rows, 3, 1};
      Problem<float> problem(shape, 0, 1);
      for (float& value : problem.x) value = constant;
      const auto got = problem.run(table());
      for (int64_t n = 0; n < rows; ++n)
        for (int64_t c = 0; c < 3; ++c) ASSERT_EQ(got.output[at(shape, n, c, 0)], problem.bias[c]);
      // The mean of n equal doubles is exact too, for which a sum alone would not do.
      Problem<double> wide(shape, 0, 1);
      for (double& value : wide.x) value = 0.1;
      EXPECT_EQ(wide.run(table()).mean[0], 0.1);
    }
}

TEST_P(Kernels, AnOutlierInTheFirstRowCostsNoDigits) {
  const Shape shape{1000, 3, 1};
  Problem<double> problem(shape, 0, 1);
  for (int64_t c = 0; c < 3; ++c) problem.x[static_cast<std::size_t>(c)] = 1e9;
  const auto got = problem.run(table());
  const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
  EXPECT_LE(error(got.output, want.output), 1e-14);
}

TEST_P(Kernels, ABadChannelLeavesTheOthersAlone) {
  const Shape shape{300, 40, 1};
  Problem<float> problem(shape, 0, 1);
  const auto before = problem.run(table());
  problem.x[at(shape, 7, 5, 0)] = std::numeric_limits<float>::quiet_NaN();
  problem.x[at(shape, 200, 39, 0)] = std::numeric_limits<float>::infinity();
  const auto after = problem.run(table());
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c) {
      const std::size_t i = at(shape, n, c, 0);
      if (c == 5 || c == 39) {
        EXPECT_TRUE(std::isnan(after.output[i]));
      } else {
        ASSERT_EQ(std::memcmp(&before.output[i], &after.output[i], sizeof(float)), 0);
        ASSERT_EQ(std::memcmp(&before.grad_input[i], &after.grad_input[i], sizeof(float)), 0);
      }
    }
}

// What lies beside a channel decides how it is summed, not the bits of its sums: channels far from zero, constant
// ones, and others whose shift only their first rows would ask for.
TEST_P(Kernels, AChannelHasTheSameBitsAloneAndBesideOthers) {
  const Shape shape{300, 150, 1};
  Problem<float> problem(shape, 0, 1);
  for (int64_t n = 0; n < shape.n; ++n)
    for (int64_t c = 0; c < shape.c; ++c) {
      float& x = problem.x[at(shape, n, c, 0)];
      if (c % 11 == 3) x += 1e4F;
      if (c % 11 == 5) x = 7.25F;
      if (c % 11 == 7) x += n % 128 < 4 ? 100 : 0;
      if (c % 11 == 9) x = n % 3 == 0 ? 0 : x;
    }
  const auto all = problem.run(table());
  for (int64_t c = 0; c < shape.c; ++c) {
    Problem<float> alone({shape.n, 1, 1}, 0, 1);
    for (int64_t n = 0; n < shape.n; ++n) {
      alone.x[static_cast<std::size_t>(n)] = problem.x[at(shape, n, c, 0)];
      alone.g[static_cast<std::size_t>(n)] = problem.g[at(shape, n, c, 0)];
    }
    alone.weight[0] = problem.weight[c];
    alone.bias[0] = problem.bias[c];
    const auto one = alone.run(table());
    EXPECT_EQ(one.mean[0], all.mean[c]) << c;
    EXPECT_EQ(one.invstd[0], all.invstd[c]) << c;
    EXPECT_EQ(one.grad_weight[0], all.grad_weight[c]) << c;
    EXPECT_EQ(one.grad_bias[0], all.grad_bias[c]) << c;
  }
}

// Data far from zero whose first rows, or first values of a line, just do not say so: every segment is summed
// without a shift, and loses most.
TEST_P(Kernels, FirstRowsThatHideTheMeanCostFewDigits) {
  // Of 53 bits log2(1026 * 128) = 17 may cancel, and 128 roundings take six more: 2^-30 of the variance is left,
  // half of that of invstd. Along short lines, in segments of 1024 and lanes of 16, it is 20 and five more. Data
  // whose first rows are alike would lose 27 bits by the cancelling alone.
  struct Case {
    Shape shape;
    int64_t lines_of_a_segment;
    double bound;
  };
  for (const auto& [shape, step, bound] : {Case{{4096, 9, 1}, 128, 4.7e-10}, Case{{64, 9, 64}, 16, 1.9e-9}}) {
    Problem<float> problem(shape, 1e4, 1);
    for (int64_t n = 0; n < shape.n; n += step)
      for (int64_t c = 0; c < shape.c; ++c)
        problem.x[shape.l == 1 ? at(shape, n + 1, c, 0) : at(shape, n, c, 1)] += 630;
    const auto got = problem.run(table());
    const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
    EXPECT_LE(error(got.invstd, want.invstd), bound) << shape.l;
    EXPECT_LE(error(got.mean, want.mean), 1e-15) << shape.l;
  }
}

TEST_P(Kernels, DataFarFromZeroKeepTheirDigits) {
  for (const Shape& shape : {Shape{4096, 9, 1}, Shape{64, 9, 64}}) {
    Problem<float> problem(shape, 1e6, 1);
    const auto got = problem.run(table());
    const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
    // About one of the data seven of 53 bits may cancel in a segment of 128, ten in one of 1024 along lines, where
    // lanes of 16 round less often; a sum about zero would lose 40.
    EXPECT_LE(error(got.invstd, want.invstd), 1e-14) << shape.l;
  }
}

// The dimension that lies innermost decides the order of the sums of long lines, so that channels-last data of
// those may differ in the last bits; in every other layout, and at every address, the bits are the same.
TEST_P(Kernels, BitsDoNotDependOnThreadsStridesOrInstructionSet) {
  for (const Shape& shape : kShapes)
    for (const bool training : {true, false}) {
      Problem<float> problem(shape, 3.0, 2.0);
      Problem<double> wide(shape, 3.0, 2.0);
      const KernelTable& first = *find_isa(supported_isas().front());
      const auto want = problem.run(first, 1, Layout::contiguous, training);
      const auto want_wide = wide.run(first, 1, Layout::contiguous, training);
      SCOPED_TRACE(::testing::Message() << shape.n << "x" << shape.c << "x" << shape.l);
      for (const int threads : {1, 2, 3, 4, 8})
        EXPECT_TRUE(want.same(problem.run(table(), threads, Layout::contiguous, training))) << threads;
      problem.stream_from = wide.stream_from = 0;  // the way of writing changes no bit either
      EXPECT_TRUE(want.same(problem.run(table(), 2, Layout::contiguous, training)));
      EXPECT_TRUE(want_wide.same(wide.run(table(), 2, Layout::contiguous, training)));
      for (const Layout layout : {Layout::channels_last, Layout::transposed, Layout::padded_rows}) {
        if (shape.l >= 32 && layout != Layout::padded_rows) {
          const auto first_run = problem.run(first, 1, layout, training);
          EXPECT_TRUE(first_run.same(problem.run(table(), 3, layout, training))) << static_cast<int>(layout);
          const std::vector<long double> contiguous(want.output.begin(), want.output.end());
          EXPECT_LE(error(first_run.output, contiguous), 2 * 6.1e-8);  // a rounding either way
          continue;
        }
        EXPECT_TRUE(want.same(problem.run(table(), 2, layout, training))) << static_cast<int>(layout);
        EXPECT_TRUE(want_wide.same(wide.run(table(), 2, layout, training))) << static_cast<int>(layout);
      }
    }
}

TEST_P(Kernels, OnlyTheAskedForGradientsAreWritten) {
  const Shape shape{50, 6, 1};
  Problem<float> problem(shape, 0, 1);
  const auto all = problem.run(table());
  for (int mask = 0; mask < 8; ++mask) {
    std::vector<float> gi(elements(shape));
    std::vector<float> gw(6);
    std::vector<float> gb(6);
    std::vector<double> scratch(backward_scratch(shape));
    BackwardArgs args{};
    args.shape = shape;
    args.dtype = args.param_dtype = DType::f32;
    args.training = true;
    args.input = {problem.x.data(), 6, 1, 1};
    args.grad_output = {problem.g.data(), 6, 1, 1};
    args.weight = {problem.weight.data(), 1};
    args.mean = all.mean.data();
    args.invstd = all.invstd.data();
    args.grad_input = (mask & 1) != 0 ? gi.data() : nullptr;
    args.grad_weight = (mask & 2) != 0 ? gw.data() : nullptr;
    args.grad_bias = (mask & 4) != 0 ? gb.data() : nullptr;
    args.scratch = scratch.data();
    args.threads = 1;
    table().backward(args);
    EXPECT_EQ(same_bits(gi, all.grad_input), (mask & 1) != 0);
    EXPECT_EQ(same_bits(gw, all.grad_weight), (mask & 2) != 0);
    EXPECT_EQ(same_bits(gb, all.grad_bias), (mask & 4) != 0);
  }
}

// An element is read before it is overwritten, and once: in whole vectors and in the rest of a row.
template <typename T, typename Draw>
void expect_the_same_in_place(const KernelTable& table, Draw draw) {
  for (const Shape& shape : kShapes)
    for (const Relu relu : {Relu::none, Relu::after, Relu::before})
      for (const bool training : {true, false}) {
        Problem<T> problem(shape, 0.5, 2.0, draw);
        problem.relu = relu;
        problem.stream_from = 0;  // which over the gradient itself counts for nothing
        const auto want = problem.run(table, 1, Layout::contiguous, training);
        problem.in_place = true;
        EXPECT_TRUE(want.same(problem.run(table, 1, Layout::contiguous, training)))
            << shape.n << "x" << shape.c << "x" << shape.l << " ReLU " << static_cast<int>(relu);
      }
}

TEST_P(Kernels, GradInputMayLieOverGradOutput) {
  expect_the_same_in_place<float>(table(), normal<float>);
  expect_the_same_in_place<BFloat16Bits>(table(), small_numbers<BFloat16Bits>);
}

// Where a result's memory can hold the partial results, a call touches no other: what it needs beyond its results
// does not grow with the rows.
TEST_P(Kernels, PartialResultsLieInTheResult) {
  const Shape shape{8193, 9, 1};  // 33 segments of 256 rows, the last of one
  const std::int64_t others = 32 * 9;
  for (const int threads : {1, 2}) {
    Problem<float> problem(shape, 0.5, 2.0);
    const auto want = problem.run(table(), threads);
    EXPECT_EQ(want.forward_partials, 0);
    EXPECT_EQ(want.backward_partials, 0);
    problem.in_place = true;
    const auto in_place = problem.run(table(), threads);
    EXPECT_TRUE(want.same(in_place));
    EXPECT_EQ(in_place.backward_partials, 2 * others);  // the gradient is still read
    problem.in_place = false;
    problem.offset = 1;
    const auto unaligned = problem.run(table(), threads);
    EXPECT_TRUE(want.same(unaligned));
    EXPECT_EQ(unaligned.forward_partials, 2 * others);  // no double lies at four bytes
    EXPECT_EQ(unaligned.backward_partials, 2 * others);
  }
  Problem<double> problem(shape, 0.5, 2.0);
  const auto want = problem.run(table());
  EXPECT_EQ(want.forward_partials, 0);
  EXPECT_EQ(want.backward_partials, 0);
}

// Where channels go block by block, results and partial results are written in turn: these take the room of one
// block.
TEST_P(Kernels, PartialResultsOfABlockTakeThePlaceOfTheOneBefore) {
  const Shape shape{512, 1030, 1};  // 4 segments, and blocks of 256 channels in the forward
  Problem<float> problem(shape, 0.5, 2.0);
  const auto got = problem.run(table());
  EXPECT_EQ(got.forward_partials, 2 * 3 * 256);
  EXPECT_EQ(got.backward_partials, 0);  // two arrays leave no room for such blocks: it goes by rows
  const auto want = reference(shape, problem.x, problem.weight, problem.bias, problem.g, problem.eps);
  EXPECT_LE(error(got.output, want.output), 2.5e-7);            // four roundings of 6e-8 an element
  EXPECT_LE(error(got.grad_weight, want.grad_weight), 6.1e-8);  // one
  EXPECT_TRUE(got.same(problem.run(table(), 2)));
}

TEST(Dispatch, NamesAreConsistent) {
  for (const std::string& name : supported_isas()) {
    ASSERT_NE(find_isa(name), nullptr);
    EXPECT_EQ(name, find_isa(name)->isa);
  }
  EXPECT_EQ(find_isa("no such set"), nullptr);
  EXPECT_NE(find_isa(active().isa), nullptr);
}

}  // namespace
}  // namespace torch_bn::testing
