// Backward: the two sums per channel, the parameters' gradients, grad_input.
#pragma once

#include "elementwise.h"
#include "schedule.h"
#include "sums.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Sums over the rows (g is grad_output):
//
//   total = sum(g)        dot = sum(g * (x - mean))
//
// Of data narrower than double dot is sum(g * x) - mean * total. The products are exact; what cancels is no
// more than the mean exceeds the standard deviation by, of which float32 data can hold 24 bits, double 53.
// ---------------------------------------------------------------------------------------------------------
struct GradientTerm {
  static constexpr int kOperands = 2;
  static void add(Vec /*centre*/, const Vec* x_and_g, Vec& total, Vec& dot) {
    total += x_and_g[1];
    dot = add_exact_product(x_and_g[0], x_and_g[1], dot);
  }
};

// Sums of float64 data, each in kLanes parts: sums of doubles need more care in double.
inline void segment_sums_of_doubles(const BackwardArgs& args, Range rows, Range channels, double* total,
                                    double* dot) {
  Block<double> input;
  Block<double> grad;
  TileSums sums = {};
  alignas(64) double mean[kTileChannels] = {};
  for (i64 c = channels.begin; c < channels.end; ++c) mean[c - channels.begin] = args.mean[c];
  for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const Range block{begin, min_of(begin + kBlockRows, rows.end)};
    pack<Float64>(args.input, args.shape, block, channels, input);
    pack<Float64>(args.grad_output, args.shape, block, channels, grad);
    for (i64 c = 0; c < channels.size(); c += kWidth) {
      const Vec centre = load(mean + c);
      const auto g = [&](i64 r) { return load(&grad.at[r][c]); };
      store(&sums.first[c], load(&sums.first[c]) + sum_rows(block.size(), g));
      store(&sums.second[c], load(&sums.second[c]) + sum_rows(block.size(), [&](i64 r) {
                               return g(r) * (load(&input.at[r][c]) - centre);
                             }));
    }
  }
  for (i64 c = channels.begin; c < channels.end; ++c) {
    total[c] = sums.first[c - channels.begin];
    dot[c] = sums.second[c - channels.begin];
  }
}

// Sums of one segment in at most kTileChannels channels, to its place in scratch.
template <typename Element>
void gradient_sums(const BackwardArgs& args, const Partition& partition, i64 segment, Range channels) {
  const Range items = partition.segment(segment);
  const Range rows = partition.rows_of(items);
  double* total = args.scratch + kBackwardPartials * segment * args.shape.c;
  double* dot = total + args.shape.c;
  const ArrayView views[] = {args.input, args.grad_output};
  if constexpr (Element::kIsDouble) {
    segment_sums_of_doubles(args, rows, channels, total, dot);
    return;
  } else if (partition.along_lines) {
    for (i64 c = channels.begin; c < channels.end; ++c)
      sums_by_lines<Element, GradientTerm>(views, partition, items, c, 0.0, {}, total[c], dot[c]);
  } else {
    TileSums sums = {};
    alignas(64) constexpr double kNoCentre[kTileChannels] = {};
    sums_by_rows<Element, GradientTerm>(views, args.shape, rows, channels, kNoCentre, sums);
    for (i64 c = channels.begin; c < channels.end; ++c) {
      total[c] = sums.first[c - channels.begin];
      dot[c] = sums.second[c - channels.begin];
    }
  }
  for (i64 c = channels.begin; c < channels.end; ++c) dot[c] -= args.mean[c] * total[c];
}

// ---------------------------------------------------------------------------------------------------------
// Gradients (Ioffe and Szegedy 2015, section 3, with the sums collected; n = rows, scale = invstd * weight):
//
//   grad_bias   = total
//   grad_weight = dot * invstd
//   grad_input  = (g - ((x - mean) * (dot * invstd^2 / n) + total / n)) * scale     in training
//   grad_input  = g * scale                                                       in evaluation
//
// In float32, mean = high + low, and low * (dot * invstd^2 / n) is taken from total / n.
// ---------------------------------------------------------------------------------------------------------
template <typename Real>
struct TrainingGradient {
  const Real* mean;
  const Real* slope;
  const Real* shift;
  const Real* scale;

  template <typename T>
  struct Coefficients {
    T mean, slope, shift, scale;
    T operator()(T g, T x) const { return (g - ((x - mean) * slope + shift)) * scale; }
  };
  template <typename T>
  Coefficients<T> at(i64 c) const {
    return {load_as<T>(mean + c), load_as<T>(slope + c), load_as<T>(shift + c), load_as<T>(scale + c)};
  }
  template <typename V>
  Coefficients<V> along(i64 c) const {
    return {broadcast<V>(mean[c]), broadcast<V>(slope[c]), broadcast<V>(shift[c]), broadcast<V>(scale[c])};
  }
};

template <typename Real>
struct EvaluationGradient {
  const Real* scale;

  template <typename T>
  struct Coefficients {
    T scale;
    T operator()(T g) const { return g * scale; }
  };
  template <typename T>
  Coefficients<T> at(i64 c) const {
    return {load_as<T>(scale + c)};
  }
  template <typename V>
  Coefficients<V> along(i64 c) const {
    return {broadcast<V>(scale[c])};
  }
};

// Scratch: the segments' sums, then coefficients over the channels in double and in float.
struct BackwardScratch {
  double* slope;
  double* shift;
  double* scale;
  float* high;
  float* narrow_slope;
  float* narrow_shift;
  float* narrow_scale;
  std::uint8_t* plain;

  BackwardScratch(const BackwardArgs& args, const Partition& partition) {
    const i64 channels = args.shape.c;
    Arrays arrays(args.scratch + kBackwardPartials * partition.segments * channels);
    slope = arrays.take<double>(channels);
    shift = arrays.take<double>(channels);
    scale = arrays.take<double>(channels);
    high = arrays.take<float>(channels);
    narrow_slope = arrays.take<float>(channels);
    narrow_shift = arrays.take<float>(channels);
    narrow_scale = arrays.take<float>(channels);
    plain = arrays.take<std::uint8_t>(channels);
  }
};

// Merges the segments' sums of some channels, and leaves them in the first segment's place.
inline void merge_gradient_sums(const BackwardArgs& args, const Partition& partition, Range channels) {
  const i64 stride = kBackwardPartials * args.shape.c;
  visit_tree(partition.segments, [&](i64 left, i64 right) {
    double* a = args.scratch + left * stride;
    const double* b = args.scratch + right * stride;
    for (i64 array = 0; array < stride; array += args.shape.c)
      for (i64 c = array + channels.begin; c < array + channels.end; ++c) a[c] += b[c];
  });
}

// From the sums to the parameters' gradients and the coefficients of some channels.
template <typename Element, typename Param>
void finish_gradients(const BackwardArgs& args, const Partition& partition, const BackwardScratch& scratch,
                      bool has_sums, Range channels) {
  const double rows = static_cast<double>(partition.rows);
  const double* mean = args.mean;
  const double* invstd = args.invstd;
  double* scale = scratch.scale;
  read_channels<Param>(args.weight, channels, 1.0, scale);
  if (has_sums) {
    merge_gradient_sums(args, partition, channels);
    const double* total = args.scratch;
    const double* dot = total + args.shape.c;
#pragma omp simd
    for (i64 c = channels.begin; c < channels.end; ++c) {
      scratch.shift[c] = total[c] / rows;
      scratch.slope[c] = dot[c] * invstd[c] * invstd[c] / rows;
    }
    for (i64 c = channels.begin; c < channels.end && args.grad_weight != nullptr; ++c)
      write_channel<Param>(args.grad_weight, c, dot[c] * invstd[c]);
    for (i64 c = channels.begin; c < channels.end && args.grad_bias != nullptr; ++c)
      write_channel<Param>(args.grad_bias, c, total[c]);
  } else {
    for (i64 c = channels.begin; c < channels.end; ++c) scratch.shift[c] = scratch.slope[c] = 0.0;
  }
#pragma omp simd
  for (i64 c = channels.begin; c < channels.end; ++c) {
    scale[c] *= invstd[c];
    const float high = static_cast<float>(mean[c]);
    const double slope = scratch.slope[c];
    const double shift = scratch.shift[c] - (mean[c] - static_cast<double>(high)) * slope;
    scratch.high[c] = high;
    scratch.narrow_slope[c] = static_cast<float>(slope);
    scratch.narrow_shift[c] = static_cast<float>(shift);
    scratch.narrow_scale[c] = static_cast<float>(scale[c]);
    scratch.plain[c] =
        Element::kIsDouble ||
                (plain_factor(scale[c]) &&
                 (!args.training || (plain_term(mean[c]) && plain_factor(slope) && plain_term(shift))))
            ? 1
            : 0;
  }
}

// grad_input over some units and channels.
template <typename Element>
void write_grad_input(const BackwardArgs& args, const BackwardScratch& scratch, bool stream, Range units,
                      Range channels) {
  if (args.grad_input == nullptr) return;
  constexpr bool kDouble = Element::kIsDouble;
  if (args.training) {
    const TrainingGradient<double> in_double{args.mean, scratch.slope, scratch.shift, scratch.scale};
    const TrainingGradient<float> in_float{scratch.high, scratch.narrow_slope, scratch.narrow_shift,
                                           scratch.narrow_scale};
    const auto& real = select<kDouble>(in_double, in_float);
    for_each_element<Element>(Operation{real, in_double, scratch.plain, stream}, args.shape, units, channels,
                              args.grad_input, args.grad_output, args.input);
  } else {
    const EvaluationGradient<double> in_double{scratch.scale};
    const EvaluationGradient<float> in_float{scratch.narrow_scale};
    const auto& real = select<kDouble>(in_double, in_float);
    for_each_element<Element>(Operation{real, in_double, scratch.plain, stream}, args.shape, units, channels,
                              args.grad_input, args.grad_output);
  }
}

template <typename Element, typename Param>
void backward(const BackwardArgs& args) {
  const Shape& shape = args.shape;
  const Partition partition(shape, sums_run_along_lines(shape, args.input));
  const BackwardScratch scratch(args, partition);
  const bool has_sums =
      args.grad_weight != nullptr || args.grad_bias != nullptr || (args.training && args.grad_input != nullptr);
  constexpr i64 kSize = sizeof(typename Element::Storage);
  const i64 elements = partition.rows * shape.c;
  // Over the gradient itself results are written to lines that are in the cache already.
  const bool stream = elements * kSize >= args.stream_from && can_stream<Element>(shape, args.grad_input) &&
                      args.grad_input != args.grad_output.data;
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Schedule schedule(shape, partition, kSize, /*operands=*/2, team.size());
    run_phases(
        team, schedule, partition, shape.c, units, has_sums,
        [&](i64 segment, Range tile) { gradient_sums<Element>(args, partition, segment, tile); },
        [&](Range channels) { finish_gradients<Element, Param>(args, partition, scratch, has_sums, channels); },
        [&](Range some, Range channels) { write_grad_input<Element>(args, scratch, stream, some, channels); });
  });
}

}  // namespace
}  // namespace torch_bn::kernels
