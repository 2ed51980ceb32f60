// Forward: statistics of the batch, running statistics, normalised output.
#pragma once

#include "elementwise.h"
#include "moments.h"
#include "schedule.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Running statistics (m = momentum, n = rows; the running variance is the unbiased one):
//
//   running_mean = (1 - m) * running_mean + m * mean
//   running_var  = (1 - m) * running_var  + m * M2 / (n - 1)
// ---------------------------------------------------------------------------------------------------------
template <typename Param>
void update_running(const ChannelView& running, double momentum, Range channels, const double* statistic,
                    double divisor) {
  if (running.data == nullptr) return;
  auto* data = static_cast<typename Param::Storage*>(running.data);
  const double keep = 1.0 - momentum;
  const auto moved = [&](i64 c, typename Param::Storage old) {
    return Param::store(
        static_cast<typename Param::Real>(keep * Param::load(old) + momentum * (statistic[c] / divisor)));
  };
  if (running.stride == 1) {
#pragma omp simd
    for (i64 c = channels.begin; c < channels.end; ++c) data[c] = moved(c, data[c]);
  } else {
    for (i64 c = channels.begin; c < channels.end; ++c)
      data[c * running.stride] = moved(c, data[c * running.stride]);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Normalisation (Ioffe and Szegedy 2015, algorithm 1), centred before it is scaled, because x * a + b cancels:
//
//   invstd = 1 / sqrt(M2 / n + eps)      scale = invstd * weight      y = (x - mean) * scale + bias
//
// In float32 the mean is carried in two parts, mean = high + low, and the low one goes into the bias:
//
//   y = (x - high) * scale + (bias - low * scale)
//
// With a ReLU: relu(y), or relu(x) for x.
// ---------------------------------------------------------------------------------------------------------
template <Relu kRelu, typename Real>
struct Normalise {
  const Real* mean;
  const Real* scale;
  const Real* bias;

  template <typename T>
  struct At {
    T mean, scale, bias;
    T operator()(T x) const {
      const T y = (before_norm<kRelu>(x) - mean) * scale + bias;
      if constexpr (kRelu == Relu::after) return rectified(y);
      return y;
    }
  };
  template <typename T>
  At<T> at(i64 c) const {
    return {load_as<T>(mean + c), load_as<T>(scale + c), load_as<T>(bias + c)};
  }
  template <typename V>
  At<V> along(i64 c) const {
    return {broadcast<V>(mean[c]), broadcast<V>(scale[c]), broadcast<V>(bias[c])};
  }
};

// Scratch: the first segment's moments, then the coefficients over the channels, then the other segments'
// moments; the mean is the caller's.
inline Coefficients forward_coefficients(const ForwardArgs& args) {
  const i64 channels = args.shape.c;
  Arrays arrays(args.scratch + kForwardPartials * channels);
  return Coefficients::take(arrays, args.mean, channels);
}

// The segments' moments: in scratch, or but for the first one's in the result's memory.
template <typename Element>
Partials forward_partials(const ForwardArgs& args, double* spare) {
  const i64 channels = args.shape.c;
  double* behind = args.scratch + (kForwardPartials + kForwardCoefficients) * channels + kAlignmentRoom;
  return {args.scratch, spare != nullptr ? spare : behind, kMomentArrays<Element>, channels};
}

// From the batch's moments to what normalises it, and into the running statistics.
template <typename Param>
void finish_statistics(const ForwardArgs& args, const double* batch_mean, const double* m2, double rows,
                       Range channels) {
  double* mean = args.mean;
  double* invstd = args.invstd;
#pragma omp simd
  for (i64 c = channels.begin; c < channels.end; ++c) {
    mean[c] = batch_mean[c];
    invstd[c] = 1.0 / __builtin_sqrt(m2[c] / rows + args.eps);
  }
  update_running<Param>(args.running_mean, args.momentum, channels, batch_mean, 1.0);
  update_running<Param>(args.running_var, args.momentum, channels, m2, rows - 1.0);
}

// From the statistics in `args` to the coefficients of some channels. Takes the pointers by value: else they would
// have to be read again after every store.
template <typename Element, typename Param>
void set_coefficients(const ForwardArgs& args, Coefficients of, Range channels) {
  const double* invstd = args.invstd;
  read_channels<Param>(args.weight, channels, 1.0, of.scale);
  read_channels<Param>(args.bias, channels, 0.0, of.bias);
#pragma omp simd
  for (i64 c = channels.begin; c < channels.end; ++c) {
    of.scale[c] *= invstd[c];
    of.narrow<Element>(c);
  }
}

// From the batch's moments, or the running statistics, to the coefficients of some channels.
template <typename Element, typename Param>
void finish_channels(const ForwardArgs& args, const Partition& partition, const Partials& partials,
                     const Coefficients& of, Range channels) {
  if (args.training) {
    merge_segments<Element>(partition, partials, channels);
    const Partial whole = partial_of<Element>(partials, 0);
    finish_statistics<Param>(args, whole.mean, whole.m2, static_cast<double>(partition.rows), channels);
  } else {
    double* invstd = args.invstd;
    read_channels<Param>(args.running_mean, channels, 0.0, args.mean);
    read_channels<Param>(args.running_var, channels, 1.0, invstd);
#pragma omp simd
    for (i64 c = channels.begin; c < channels.end; ++c) invstd[c] = 1.0 / __builtin_sqrt(invstd[c] + args.eps);
  }
  set_coefficients<Element, Param>(args, of, channels);
}

// What is done to every element, and how the result is written.
template <typename Element, Relu kRelu>
auto normalisation(const ForwardArgs& args, const Coefficients& of) {
  const Normalise<kRelu, double> in_double{of.mean, of.scale, of.bias};
  const Normalise<kRelu, float> in_float{of.high, of.narrow_scale, of.narrow_bias};
  const auto& real = select<Element::kIsDouble>(in_double, in_float);
  const Shape& shape = args.shape;
  const i64 bytes = shape.n * shape.c * shape.l * static_cast<i64>(sizeof(typename Element::Storage));
  const bool stream = bytes >= args.stream_from && can_stream<Element>(shape, args.output);
  return Operation{real, in_double, of.plain, stream};
}

template <typename Element, typename Param, Relu kRelu>
void forward(const ForwardArgs& args) {
  const Shape& shape = args.shape;
  const Partition partition(shape, sums_run_along_lines(shape, args.input));
  const Coefficients of = forward_coefficients(args);
  double* spare = spare_room(args.output);
  const auto op = normalisation<Element, kRelu>(args, of);
  constexpr i64 kSize = sizeof(typename Element::Storage);
  const i64 elements = partition.rows * shape.c;
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Schedule schedule(shape, partition, kSize, /*operands=*/1,
                            widest_tile<Element>(&args.input, 1, shape, partition), team.size());
    run_phases(
        team, schedule, partition, forward_partials<Element>(args, schedule.by_channels ? nullptr : spare),
        shape.c, units, args.training,
        [&](const Partials& partials, i64 segment, Range tile) {
          moments_of<Element, kRelu>(args, partition, partials, segment, tile);
        },
        [&](const Partials& partials, Range channels) {
          finish_channels<Element, Param>(args, partition, partials, of, channels);
        },
        [&](Range some, Range channels) {
          for_each_element<Element>(op, shape, some, channels, args.output, args.input);
        });
  });
}

}  // namespace
}  // namespace torch_bn::kernels
