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
template <typename Param, typename Statistic>
void update_running(const ChannelView& running, double momentum, Range channels, Statistic statistic) {
  if (running.data == nullptr) return;
  auto* data = static_cast<typename Param::Storage*>(running.data);
  const i64 stride = running.stride;
  const double keep = 1.0 - momentum;
  const auto moved = [&]<typename V>(i64 c) {
    const V old = load_channels<Param, V>(data + c * stride);
    return keep * old + momentum * statistic.template operator()<V>(c);
  };
  const auto put = [&](i64 c, auto values) { store_channels<Param>(data + c * stride, values); };
  if (stride == 1) {
    update_channels(channels, moved, put);
  } else {
    for (i64 c = channels.begin; c < channels.end; ++c) put(c, moved.template operator()<double>(c));
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
  const double eps = args.eps;
  for_channels(channels, [=]<typename V>(i64 c) {
    store(mean + c, load_as<V>(batch_mean + c));
    store(invstd + c, 1.0 / root(load_as<V>(m2 + c) / rows + eps));
  });
  update_running<Param>(args.running_mean, args.momentum, channels,
                        [=]<typename V>(i64 c) { return load_as<V>(batch_mean + c); });
  update_running<Param>(args.running_var, args.momentum, channels,
                        [=]<typename V>(i64 c) { return load_as<V>(m2 + c) / (rows - 1.0); });
}

// From the statistics in `args` to the coefficients of some channels. Takes the pointers by value: else they would
// have to be read again after every store.
template <typename Element, typename Param>
void set_coefficients(const ForwardArgs& args, Coefficients of, Range channels) {
  for_channels(channels, [=, weight = args.weight, bias = args.bias, invstd = args.invstd]<typename V>(i64 c) {
    const V scale = read_channels<Param, V>(weight, c, 1.0) * load_as<V>(invstd + c);
    of.set<Element>(c, load_as<V>(of.mean + c), scale, read_channels<Param, V>(bias, c, 0.0));
  });
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
    for_channels(channels, [=, &args]<typename V>(i64 c) {
      store(args.mean + c, read_channels<Param, V>(args.running_mean, c, 0.0));
      store(args.invstd + c, 1.0 / root(read_channels<Param, V>(args.running_var, c, 1.0) + args.eps));
    });
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
