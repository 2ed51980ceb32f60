// Backward: the two sums per channel, the parameters' gradients, grad_input.
#pragma once

#include "elementwise.h"
#include "lines.h"
#include "relu.h"
#include "schedule.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Sums over the rows (g is grad_output, or what a ReLU behind lets through of it; x is the input, or what a ReLU
// before it lets through):
//
//   total = sum(g)        dot = sum(g * (x - mean))
//
// Of data narrower than double dot is sum(g * x) - mean * total. The products are exact; what cancels is no
// more than the mean exceeds the standard deviation by, of which float32 data can hold 24 bits, double 53.
// ---------------------------------------------------------------------------------------------------------
template <Relu kRelu, typename Element>
struct GradientTerm {
  static constexpr int kOperands = 2;
  static constexpr int kVectorsAtOnce = 8;
  static auto at(i64 /*channel*/) { return nullptr; }
  static auto along(i64 /*channel*/) { return nullptr; }
  static float neutral(i64 /*channel*/) { return 0.0F; }
  static void add(std::nullptr_t, const HalfF* x_and_g, Vec& total, Vec& dot) {
    const Vec g = widen(x_and_g[1]);
    total += g;
    dot = add_exact_product(widen(before_norm<kRelu>(x_and_g[0])), g, dot);
  }
};

template <typename Element>
struct GradientTerm<Relu::after, Element> {
  static constexpr int kOperands = 2;
  static constexpr int kVectorsAtOnce = 8;  // what normalises is read from memory
  const Coefficients& of;

  auto at(i64 c) const { return pre_activation<Element, HalfF>(of, c); }
  auto along(i64 c) const { return pre_activation_along<Element, HalfF>(of, c); }
  static float neutral(i64 /*channel*/) { return 0.0F; }
  static void add(const PreActivation<Element, HalfF>& relu, const HalfF* x_and_g, Vec& total, Vec& dot) {
    const Vec g = widen(relu.passed(x_and_g[1], x_and_g[0]));
    total += g;
    dot = add_exact_product(widen(x_and_g[0]), g, dot);
  }
};

// The coefficients of the forward for the channels of a tile, counted from its first one.
struct TileCoefficients {
  alignas(64) double wide[3][kWideTile];
  alignas(64) float narrow[3][kWideTile];
  std::uint8_t plain[kWideTile];

  Coefficients view() { return {wide[0], wide[1], wide[2], narrow[0], narrow[1], narrow[2], plain}; }

  template <typename Element, typename Param>
  void fill(const BackwardArgs& args, Range channels) {
    const Coefficients of = view();
    for_channels(channels, [&]<typename V>(i64 c) {
      const i64 own = c - channels.begin;
      const V mean = load_as<V>(args.mean + c);
      store(of.mean + own, mean);
      const V scale = read_channels<Param, V>(args.weight, c, 1.0) * load_as<V>(args.invstd + c);
      of.set<Element>(own, mean, scale, read_channels<Param, V>(args.bias, c, 0.0));
    });
    // Vectors may reach beyond the last channel.
    for (i64 own = channels.size(); own < round_up(channels.size(), kWidth); ++own) {
      of.mean[own] = 0.0;
      of.set<Element>(own, 0.0, 0.0, 0.0);
    }
  }
};

// Sets what a ReLU behind does not let through to zero, in a packed tile of gradients.
template <typename Element, typename Storage>
void mask(const Coefficients& of, i64 rows, i64 width, const Block<Storage>& input, Block<Storage>& grad) {
  for (i64 c = 0; c < width; ++c) {
    const auto relu = pre_activation<Element, double>(of, c);
    for (i64 r = 0; r < rows; ++r) {
      const double x = Element::load(input.at[r][c]);
      if (relu.passed(1.0, x) == 0.0) grad.at[r][c] = Storage{};
    }
  }
}

// The sums of a tile of channels to their places. `mean` is what the products were not centred by, or null.
inline void store_sums(const TileSums& sums, Range channels, const double* mean, double* total, double* dot) {
  for_channels(channels, [=, &sums]<typename V>(i64 c) {
    const V first = load_as<V>(&sums.first[c - channels.begin]);
    const V second = load_as<V>(&sums.second[c - channels.begin]);
    store(total + c, first);
    store(dot + c, mean == nullptr ? second : second - load_as<V>(mean + c) * first);
  });
}

// Sums of float64 data, each in kLanes parts: sums of doubles need more care in double.
template <typename Param, Relu kRelu>
void segment_sums_of_doubles(const BackwardArgs& args, Range rows, Range channels, double* total, double* dot) {
  Block<double> input;
  Block<double> grad;
  TileSums sums(kTileChannels);
  alignas(64) double mean[kTileChannels] = {};
  for (i64 c = channels.begin; c < channels.end; ++c) mean[c - channels.begin] = args.mean[c];
  [[maybe_unused]] TileCoefficients coefficients;
  if constexpr (kRelu == Relu::after) coefficients.fill<Float64, Param>(args, channels);
  for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const Range block{begin, min_of(begin + kBlockRows, rows.end)};
    pack<Float64>(args.input, args.shape, block, channels, input);
    pack<Float64>(args.grad_output, args.shape, block, channels, grad);
    if constexpr (kRelu == Relu::before) rectify(input, block.size(), channels.size());
    if constexpr (kRelu == Relu::after)
      mask<Float64>(coefficients.view(), block.size(), channels.size(), input, grad);
    for (i64 c = 0; c < channels.size(); c += kWidth) {
      const Vec centre = load(mean + c);
      const auto g = [&](i64 r) { return load(&grad.at[r][c]); };
      store(&sums.first[c], load(&sums.first[c]) + sum_rows(block.size(), g));
      store(&sums.second[c], load(&sums.second[c]) + sum_rows(block.size(), [&](i64 r) {
                               return g(r) * (load(&input.at[r][c]) - centre);
                             }));
    }
  }
  store_sums(sums, channels, nullptr, total, dot);
}

// Sums by rows behind a ReLU whose mask takes double in some of the channels. A channel's sums are those of any
// other way by rows.
template <typename Element>
void masked_sums_by_rows(const ArrayView* views, const Shape& shape, Range rows, Range channels,
                         const Coefficients& of, TileSums& sums) {
  using Tile = Block<typename Element::Storage>;
  const auto change = [&](Tile* packed, i64 count) {
    mask<Element>(of, count, channels.size(), packed[0], packed[1]);
  };
  sums_by_rows<Element>(views, shape, rows, channels, GradientTerm<Relu::none, Element>{}, change, sums);
}

// The same two sums for a ReLU behind, in the rows or the items of a segment.
template <typename Element, typename Param>
void sums_behind_relu(const BackwardArgs& args, const Partition& partition, Range items, Range rows,
                      Range channels, double* total, double* dot) {
  const ArrayView views[] = {args.input, args.grad_output};
  const auto sum_rows_of = [&](Range some, const Coefficients& of) {
    TileSums sums(some.size());
    if (all_plain(of.plain, {0, some.size()}))
      sums_by_rows<Element>(views, args.shape, rows, some, GradientTerm<Relu::after, Element>{of}, nullptr, sums);
    else
      masked_sums_by_rows<Element>(views, args.shape, rows, some, of, sums);
    store_sums(sums, some, args.mean, total, dot);
  };
  TileCoefficients coefficients;
  const Coefficients of = coefficients.view();
  coefficients.fill<Element, Param>(args, channels);
  if (!partition.along_lines) {
    // Where the mask takes double, rows are packed, and of those no more fit.
    const bool packs = !all_plain(of.plain, {0, channels.size()});
    for_each_block(channels, packs ? kTileChannels : channels.size(), [&](Range tile) {
      if (tile.size() < channels.size()) coefficients.fill<Element, Param>(args, tile);
      sum_rows_of(tile, of);
    });
    return;
  }
  TileSums sums(channels.size());
  sums_by_lines<Element>(
      views, args.shape, partition, items, channels, GradientTerm<Relu::after, Element>{of},
      [&](i64 own) { return of.plain[own] == 0; }, sums);
  store_sums(sums, channels, args.mean, total, dot);
  for (i64 c = channels.begin; c < channels.end; ++c) {
    if (of.plain[c - channels.begin] != 0) continue;
    TileCoefficients alone;
    alone.fill<Element, Param>(args, {c, c + 1});
    sum_rows_of({c, c + 1}, alone.view());
  }
}

template <typename Element>
i64 widest_tile(const BackwardArgs& args, const Partition& partition) {
  const ArrayView views[] = {args.input, args.grad_output};
  return widest_tile<Element>(views, 2, args.shape, partition);
}

// Sums of one segment in a tile of channels, to their place.
template <typename Element, typename Param, Relu kRelu>
void gradient_sums(const BackwardArgs& args, const Partition& partition, const Partials& partials, i64 segment,
                   Range channels) {
  const Range items = partition.segment(segment);
  const Range rows = partition.rows_of(items);
  double* total = partials.array(segment, 0);
  double* dot = partials.array(segment, 1);
  const ArrayView views[] = {args.input, args.grad_output};
  if constexpr (Element::kIsDouble) {
    segment_sums_of_doubles<Param, kRelu>(args, rows, channels, total, dot);
  } else if constexpr (kRelu == Relu::after) {
    sums_behind_relu<Element, Param>(args, partition, items, rows, channels, total, dot);
  } else {
    TileSums sums(channels.size());
    const GradientTerm<kRelu, Element> term;
    if (partition.along_lines)
      sums_by_lines<Element>(views, args.shape, partition, items, channels, term, sums);
    else
      sums_by_rows<Element>(views, args.shape, rows, channels, term, nullptr, sums);
    store_sums(sums, channels, args.mean, total, dot);
  }
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
// A ReLU behind takes its part of g before, a ReLU before the norm its part of grad_input afterwards.
// ---------------------------------------------------------------------------------------------------------
template <Relu kRelu, typename Element, typename Real>
struct TrainingGradient {
  const Real* mean;
  const Real* slope;
  const Real* shift;
  const Real* scale;
  Coefficients of;

  template <typename T, typename Pre>
  struct At {
    T mean, slope, shift, scale;
    Pre relu;
    T operator()(T g, T x) const {
      const T centred = before_norm<kRelu>(x) - mean;
      if constexpr (kRelu == Relu::after) g = relu.passed(g, x, centred, scale);
      const T result = (g - (centred * slope + shift)) * scale;
      if constexpr (kRelu == Relu::before) return passed(result, x);
      return result;
    }
  };
  // All in one expression: GCC writes a part that has a name of its own to the stack with every vector.
  template <typename T>
  auto at(i64 c) const {
    return At<T, decltype(pre_activation_of<kRelu, Element, T>(of, c))>{
        load_as<T>(mean + c), load_as<T>(slope + c), load_as<T>(shift + c), load_as<T>(scale + c),
        pre_activation_of<kRelu, Element, T>(of, c)};
  }
  template <typename V>
  auto along(i64 c) const {
    const auto relu = pre_activation_of_line<kRelu, Element, V>(of, c);
    return At<V, decltype(relu)>{broadcast<V>(mean[c]), broadcast<V>(slope[c]), broadcast<V>(shift[c]),
                                 broadcast<V>(scale[c]), relu};
  }
};

template <Relu kRelu, typename Element, typename Real>
struct EvaluationGradient {
  const Real* scale;
  Coefficients of;

  template <typename T, typename Pre>
  struct At {
    T scale;
    Pre relu;
    T operator()(T g) const { return g * scale; }
    T operator()(T g, T x) const {
      if constexpr (kRelu == Relu::after) return relu.passed(g, x) * scale;
      return passed(g * scale, x);
    }
  };
  // In one expression, as above.
  template <typename T>
  auto at(i64 c) const {
    return At<T, decltype(pre_activation_of<kRelu, Element, T>(of, c))>{
        load_as<T>(scale + c), pre_activation_of<kRelu, Element, T>(of, c)};
  }
  template <typename V>
  auto along(i64 c) const {
    const auto relu = pre_activation_of_line<kRelu, Element, V>(of, c);
    return At<V, decltype(relu)>{broadcast<V>(scale[c]), relu};
  }
};

// Scratch: the first segment's sums, then coefficients over the channels in double and in float, then the other
// segments' sums.
struct BackwardScratch {
  double* slope;
  double* shift;
  float* narrow_slope;
  float* narrow_shift;
  std::uint8_t* plain;
  Coefficients of;  // of the forward; the mean is the caller's

  explicit BackwardScratch(const BackwardArgs& args) {
    const i64 channels = args.shape.c;
    Arrays arrays(args.scratch + kBackwardPartials * channels);
    slope = arrays.take<double>(channels);
    shift = arrays.take<double>(channels);
    narrow_slope = arrays.take<float>(channels);
    narrow_shift = arrays.take<float>(channels);
    plain = arrays.take<std::uint8_t>(channels);
    of = Coefficients::take(arrays, const_cast<double*>(args.mean), channels);
  }
};

// The segments' sums: in scratch, or but for the first one's in the result's memory.
inline Partials backward_partials(const BackwardArgs& args, double* spare) {
  const i64 channels = args.shape.c;
  double* behind = args.scratch + (kBackwardPartials + kBackwardCoefficients) * channels + kAlignmentRoom;
  return {args.scratch, spare != nullptr ? spare : behind, kBackwardPartials, channels};
}

// Merges the segments' sums of some channels, and leaves them in the first segment's place.
inline void merge_gradient_sums(const Partition& partition, const Partials& partials, Range channels) {
  visit_tree(partition.segments, [&](i64 left, i64 right) {
    for (i64 which = 0; which < kBackwardPartials; ++which) {
      double* a = partials.array(left, which);
      const double* b = partials.array(right, which);
      for (i64 c = channels.begin; c < channels.end; ++c) a[c] += b[c];
    }
  });
}

// From the sums to the parameters' gradients and the coefficients of some channels. Takes the pointers by value:
// else they would have to be read again after every store.
template <typename Element, typename Param, Relu kRelu>
void finish_gradients(const BackwardArgs& args, const Partition& partition, const Partials& partials,
                      BackwardScratch scratch, bool has_sums, Range channels) {
  using Storage = typename Param::Storage;
  const double rows = static_cast<double>(partition.rows);
  const Coefficients of = scratch.of;
  const double* total = partials.array(0, 0);
  const double* dot = partials.array(0, 1);
  auto* grad_weight = static_cast<Storage*>(args.grad_weight);
  auto* grad_bias = static_cast<Storage*>(args.grad_bias);
  if (has_sums) merge_gradient_sums(partition, partials, channels);
  for_channels(channels, [=, weight = args.weight, of_bias = args.bias, of_mean = args.mean,
                          of_invstd = args.invstd, training = args.training]<typename V>(i64 c) {
    const V mean = load_as<V>(of_mean + c);
    const V invstd = load_as<V>(of_invstd + c);
    const V scale = read_channels<Param, V>(weight, c, 1.0) * invstd;
    V shift = V{};
    V slope = V{};
    if (has_sums) {
      const V grad_of_bias = load_as<V>(total + c);
      const V grad_of_weight = load_as<V>(dot + c) * invstd;
      shift = grad_of_bias / rows;
      slope = grad_of_weight * invstd / rows;
      if (grad_weight != nullptr) store_channels<Param>(grad_weight + c, grad_of_weight);
      if (grad_bias != nullptr) store_channels<Param>(grad_bias + c, grad_of_bias);
    }
    const V narrow_shift = shift - (mean - of.set_narrow(c, mean, scale)) * slope;
    store_channels<Float32>(scratch.narrow_slope + c, slope);
    store_channels<Float32>(scratch.narrow_shift + c, narrow_shift);
    auto is_plain = plain_factor(scale);
    V bias = V{};
    if constexpr (kRelu == Relu::after) {
      bias = read_channels<Param, V>(of_bias, c, 0.0);
      is_plain &= of.set<Element>(c, mean, scale, bias);
    }
    if (training) is_plain &= plain_term(mean) & plain_factor(slope) & plain_term(narrow_shift);
    if (store_plain<Element>(scratch.plain + c, is_plain)) return;
    store(scratch.slope + c, slope);
    store(scratch.shift + c, shift);
    of.set_wide(c, scale, bias);
  });
}

// grad_input over some units and channels.
template <typename Element, Relu kRelu>
void write_grad_input(const BackwardArgs& args, const BackwardScratch& scratch, bool stream, Range units,
                      Range channels) {
  if (args.grad_input == nullptr) return;
  constexpr bool kDouble = Element::kIsDouble;
  const Coefficients& of = scratch.of;
  if (args.training) {
    const TrainingGradient<kRelu, Element, double> in_double{of.mean, scratch.slope, scratch.shift, of.scale, of};
    const TrainingGradient<kRelu, Element, float> in_float{of.high, scratch.narrow_slope, scratch.narrow_shift,
                                                           of.narrow_scale, of};
    const auto& real = select<kDouble>(in_double, in_float);
    for_each_element<Element>(Operation{real, in_double, scratch.plain, stream}, args.shape, units, channels,
                              args.grad_input, args.grad_output, args.input);
  } else {
    const EvaluationGradient<kRelu, Element, double> in_double{of.scale, of};
    const EvaluationGradient<kRelu, Element, float> in_float{of.narrow_scale, of};
    const auto& real = select<kDouble>(in_double, in_float);
    const Operation op{real, in_double, scratch.plain, stream};
    if constexpr (kRelu == Relu::none)
      for_each_element<Element>(op, args.shape, units, channels, args.grad_input, args.grad_output);
    else
      for_each_element<Element>(op, args.shape, units, channels, args.grad_input, args.grad_output, args.input);
  }
}

inline bool overwrites_gradient(const BackwardArgs& args) {
  return args.grad_input == args.grad_output.data;
}

// Whether grad_input bypasses the caches. Over the gradient itself it is written to lines that are there already.
template <typename Element>
bool streams_grad_input(const BackwardArgs& args) {
  const Shape& shape = args.shape;
  const i64 bytes = shape.n * shape.c * shape.l * static_cast<i64>(sizeof(typename Element::Storage));
  return bytes >= args.stream_from && can_stream<Element>(shape, args.grad_input) && !overwrites_gradient(args);
}

template <typename Element, typename Param, Relu kRelu>
void backward(const BackwardArgs& args) {
  const Shape& shape = args.shape;
  const Partition partition(shape, sums_run_along_lines(shape, args.input));
  const BackwardScratch scratch(args);
  double* spare = overwrites_gradient(args) ? nullptr : spare_room(args.grad_input);
  const bool has_sums =
      args.grad_weight != nullptr || args.grad_bias != nullptr || (args.training && args.grad_input != nullptr);
  constexpr i64 kSize = sizeof(typename Element::Storage);
  const i64 elements = partition.rows * shape.c;
  const bool stream = streams_grad_input<Element>(args);
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Schedule schedule(shape, partition, kSize, /*operands=*/2, widest_tile<Element>(args, partition),
                            team.size());
    run_phases(
        team, schedule, partition, backward_partials(args, schedule.by_channels ? nullptr : spare), shape.c, units,
        has_sums,
        [&](const Partials& partials, i64 segment, Range tile) {
          gradient_sums<Element, Param, kRelu>(args, partition, partials, segment, tile);
        },
        [&](const Partials& partials, Range channels) {
          finish_gradients<Element, Param, kRelu>(args, partition, partials, scratch, has_sums, channels);
        },
        [&](Range some, Range channels) {
          write_grad_input<Element, kRelu>(args, scratch, stream, some, channels);
        });
  });
}

}  // namespace
}  // namespace torch_bn::kernels
