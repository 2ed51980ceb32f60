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
// ---------------------------------------------------------------------------------------------------------
template <typename Real>
struct Normalise {
  const Real* mean;
  const Real* scale;
  const Real* bias;

  template <typename T>
  struct Coefficients {
    T mean, scale, bias;
    T operator()(T x) const { return (x - mean) * scale + bias; }
  };
  template <typename T>
  Coefficients<T> at(i64 c) const {
    return {load_as<T>(mean + c), load_as<T>(scale + c), load_as<T>(bias + c)};
  }
  template <typename V>
  Coefficients<V> along(i64 c) const {
    return {broadcast<V>(mean[c]), broadcast<V>(scale[c]), broadcast<V>(bias[c])};
  }
};

// Scratch: the segments' moments, then coefficients over the channels in double and in float.
struct ForwardScratch {
  double* scale;
  double* bias;
  float* high;
  float* narrow_scale;
  float* narrow_bias;
  std::uint8_t* plain;

  ForwardScratch(const ForwardArgs& args, const Partition& partition) {
    const i64 channels = args.shape.c;
    Arrays arrays(args.scratch + kForwardPartials * partition.segments * channels);
    scale = arrays.take<double>(channels);
    bias = arrays.take<double>(channels);
    high = arrays.take<float>(channels);
    narrow_scale = arrays.take<float>(channels);
    narrow_bias = arrays.take<float>(channels);
    plain = arrays.take<std::uint8_t>(channels);
  }
};

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

// From the statistics in `args` to the coefficients of some channels.
template <typename Element, typename Param>
void set_coefficients(const ForwardArgs& args, const ForwardScratch& scratch, Range channels) {
  const double* mean = args.mean;
  const double* invstd = args.invstd;
  read_channels<Param>(args.weight, channels, 1.0, scratch.scale);
  read_channels<Param>(args.bias, channels, 0.0, scratch.bias);
  double* scale = scratch.scale;
  const double* bias = scratch.bias;
#pragma omp simd
  for (i64 c = channels.begin; c < channels.end; ++c) {
    scale[c] *= invstd[c];
    const float high = static_cast<float>(mean[c]);
    const double rest = bias[c] - (mean[c] - static_cast<double>(high)) * scale[c];
    scratch.high[c] = high;
    scratch.narrow_scale[c] = static_cast<float>(scale[c]);
    scratch.narrow_bias[c] = static_cast<float>(rest);
    scratch.plain[c] =
        Element::kIsDouble || (plain_factor(scale[c]) && plain_term(mean[c]) && plain_term(rest)) ? 1 : 0;
  }
}

// From the batch's moments, or the running statistics, to the coefficients of some channels.
template <typename Element, typename Param>
void finish_channels(const ForwardArgs& args, const Partition& partition, const ForwardScratch& scratch,
                     Range channels) {
  if (args.training) {
    merge_segments<Element>(args, partition, channels);
    const Partial whole(args.scratch, 0, args.shape.c);
    finish_statistics<Param>(args, whole.mean, whole.m2, static_cast<double>(partition.rows), channels);
  } else {
    double* invstd = args.invstd;
    read_channels<Param>(args.running_mean, channels, 0.0, args.mean);
    read_channels<Param>(args.running_var, channels, 1.0, invstd);
#pragma omp simd
    for (i64 c = channels.begin; c < channels.end; ++c) invstd[c] = 1.0 / __builtin_sqrt(invstd[c] + args.eps);
  }
  set_coefficients<Element, Param>(args, scratch, channels);
}

template <typename Element, typename Param>
void forward(const ForwardArgs& args) {
  const Shape& shape = args.shape;
  const Partition partition(shape, sums_run_along_lines(shape, args.input));
  const ForwardScratch scratch(args, partition);
  const Normalise<double> in_double{args.mean, scratch.scale, scratch.bias};
  const Normalise<float> in_float{scratch.high, scratch.narrow_scale, scratch.narrow_bias};
  const auto& real = select<Element::kIsDouble>(in_double, in_float);
  constexpr i64 kSize = sizeof(typename Element::Storage);
  const i64 elements = partition.rows * shape.c;
  const bool stream = elements * kSize >= args.stream_from && can_stream<Element>(shape, args.output);
  const Operation op{real, in_double, scratch.plain, stream};
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Schedule schedule(shape, partition, kSize, /*operands=*/1, team.size());
    run_phases(
        team, schedule, partition, shape.c, units, args.training,
        [&](i64 segment, Range tile) { moments_of<Element>(args, partition, segment, tile); },
        [&](Range channels) { finish_channels<Element, Param>(args, partition, scratch, channels); },
        [&](Range some, Range channels) {
          for_each_element<Element>(op, shape, some, channels, args.output, args.input);
        });
  });
}

}  // namespace
}  // namespace torch_bn::kernels
