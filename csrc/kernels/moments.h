// The moments of a batch: mean and M2, the sum of squared distances from it, per channel.
#pragma once

#include "exact_sum.h"
#include "lines.h"
#include "partials.h"
#include "relu.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Merge of (n_a, mean_a, M2_a) and (n_b, mean_b, M2_b) (Chan, Golub and LeVeque 1983, eq. 2.1):
//
//   d = mean_b - mean_a     mean = mean_a + d * n_b / n     M2 = M2_a + M2_b + d^2 * n_a * n_b / n
// ---------------------------------------------------------------------------------------------------------
struct Merge {
  double share;   // n_b / n
  double weight;  // n_a * n_b / n
  Merge(i64 count_a, i64 count_b)
      : share(static_cast<double>(count_b) / static_cast<double>(count_a + count_b)),
        weight(static_cast<double>(count_a) * share) {}

  template <typename Number>
  void operator()(Number& mean_a, Number& m2_a, Number mean_b, Number m2_b) const {
    const Number delta = mean_b - mean_a;
    mean_a += delta * share;
    m2_a += m2_b + delta * delta * weight;
  }
};

// The moments of a segment, each an array over the channels.
struct Partial {
  double* mean;
  double* m2;
  double* sum_hi = nullptr;  // of float64 data only
  double* sum_lo = nullptr;
};

template <typename Element>
constexpr i64 kMomentArrays = Element::kIsDouble ? kForwardPartials : 2;

template <typename Element>
Partial partial_of(const Partials& partials, i64 segment) {
  Partial one{partials.array(segment, 0), partials.array(segment, 1)};
  if constexpr (Element::kIsDouble) {
    one.sum_hi = partials.array(segment, 2);
    one.sum_lo = partials.array(segment, 3);
  }
  return one;
}

// ---------------------------------------------------------------------------------------------------------
// Moments of a segment of k rows of data narrower than double, in one sweep (where a ReLU comes before, x is what
// it lets through), about a shift that is zero or the first row, x_0:
//
//   s = sum(x - shift)     q = sum((x - shift)^2)     mean = shift + s / k     M2 = q - s^2 / k
//
// In double the subtractions of x_0 may cancel up to 25 bits and leave more than float32 holds. The last one
// cancels at most log2(k + 1) bits, because x_0 is one of the data: M2 >= (x_0 - mean)^2, and q = M2 + k (x_0 -
// mean)^2. This shift makes a constant channel's moments exact. Without a shift the squares are exact and nothing
// has to be subtracted, a fifth of the time. That is for channels of which one of the first rows lies at least
// |x_0| / 16 from the first: then M2 >= x_0^2 / 512, so that k mean^2 <= 1026 k M2, and ten bits more may cancel.
// ---------------------------------------------------------------------------------------------------------
template <Relu kRelu>
struct ShiftedMoments {
  static constexpr int kOperands = 1;
  static constexpr int kVectorsAtOnce = 8;  // their sums fill the registers
  const double* shift;

  Vec at(i64 c) const { return load(shift + c); }
  Vec along(i64 c) const { return broadcast<Vec>(shift[c]); }
  float neutral(i64 c) const { return static_cast<float>(shift[c]); }
  static void add(Vec shift, const HalfF* x, Vec& s, Vec& q) {
    const Vec d = widen(before_norm<kRelu>(x[0])) - shift;
    s += d;
    q += d * d;
  }
};

template <Relu kRelu>
struct PlainMoments {
  static constexpr int kOperands = 1;
  static constexpr int kVectorsAtOnce = 8;
  static auto at(i64 /*channel*/) { return nullptr; }
  static auto along(i64 /*channel*/) { return nullptr; }
  static float neutral(i64 /*channel*/) { return 0.0F; }
  static void add(std::nullptr_t, const HalfF* x, Vec& s, Vec& q) {
    const Vec d = widen(before_norm<kRelu>(x[0]));
    s += d;
    q = add_exact_product(d, d, q);
  }
};

// A channel gets a shift whose first rows lie so many times closer to the first of them than that to zero.
constexpr float kCloseness = 16.0F;
constexpr i64 kRowsLookedAt = 4;

template <typename V>
void set_moments(const Partial& partial, i64 c, double rows, V shift, V s, V q) {
  const V offset = s / rows;
  const V m2 = q - s * offset;
  store(partial.mean + c, shift + offset);
  store(partial.m2 + c, m2 < V{} ? V{} : m2);
}

// The shift of one channel, or of each of a vector of them, by its first rows: row(r) is what is summed of them.
template <typename Row>
auto shift_by(i64 looked_at, const Row& row) {
  using V = decltype(row(0));
  const V x_0 = row(0);
  V farthest = V{};
  for (i64 r = 1; r < looked_at; ++r) {
    const V distance = magnitude(row(r) - x_0);
    farthest = distance > farthest ? distance : farthest;
  }
  return magnitude(x_0) > farthest * kCloseness ? x_0 : V{};
}

// The shifts of some channels, and zeros to the end of the last vector; returns whether any differs from zero.
template <typename Element, Relu kRelu>
bool choose_shifts(const ArrayView& input, const Shape& shape, Range rows, Range channels, double* shift) {
  const i64 looked_at = min_of(rows.size(), kRowsLookedAt);
  const i64 width = channels.size();
  Vec all = Vec{};
  i64 c = 0;
  if (has_plain_rows(input, shape)) {
    const auto from = plain_rows<Element>(input, shape, rows.begin, channels.begin);
    for (; c + kWidth <= width; c += kWidth) {
      const Vec chosen = widen(shift_by(looked_at, [&](i64 r) {
        return before_norm<kRelu>(Element::load_half(from.data + r * from.stride + c));
      }));
      store(shift + c, chosen);
      all = chosen != Vec{} ? chosen : all;
    }
  }
  bool any = false;
  for (int i = 0; i < kWidth; ++i) any |= all[i] != 0.0;
  const i64 first_n = rows.begin / shape.l;
  const i64 first_l = rows.begin % shape.l;
  for (; c < round_up(width, kWidth); ++c) {
    shift[c] = c >= width ? 0.0 : shift_by(looked_at, [&](i64 r) {
      i64 n = first_n;
      i64 l = first_l + r;
      for (; l >= shape.l; l -= shape.l) ++n;
      return before_norm<kRelu>(Element::load(*element_at<Element>(input, n, channels.begin + c, l)));
    });
    any |= shift[c] != 0.0;
  }
  return any;
}

// Channel by channel: the values that choose the shift are in a cache when they are summed.
template <typename Element, Relu kRelu>
void moments_by_long_lines(const ArrayView& input, const Shape& shape, const Partition& partition, Range items,
                           double count, Range channels, const Partial& partial) {
  Lines<Element, 1> lines(&input, shape);
  const i64 n = items.begin / partition.pieces;
  const i64 begin = items.begin % partition.pieces * kPiece;
  const i64 looked_at = min_of(shape.l - begin, kRowsLookedAt);
  for (i64 c = channels.begin; c < channels.end; ++c) {
    const double shift = shift_by(looked_at, [&](i64 r) {
      return before_norm<kRelu>(Element::load(*element_at<Element>(input, n, c, begin + r)));
    });
    const auto sums =
        shift == 0.0 ? sums_by_long_lines<Element>(lines, partition, items, c, PlainMoments<kRelu>{}, 0)
                     : sums_by_long_lines<Element>(lines, partition, items, c, ShiftedMoments<kRelu>{&shift}, 0);
    set_moments(partial, c, count, shift, sums.first, sums.second);
  }
}

template <typename Element, Relu kRelu>
void segment_moments(const ArrayView& input, const Shape& shape, const Partition& partition, i64 segment,
                     Range channels, const Partial& partial) {
  const Range items = partition.segment(segment);
  const Range rows = partition.rows_of(items);
  const double count = static_cast<double>(rows.size());
  if (partition.along_lines && shape.l >= kShortLine) {
    moments_by_long_lines<Element, kRelu>(input, shape, partition, items, count, channels, partial);
    return;
  }
  alignas(64) double shift[kWideTile];
  TileSums sums(channels.size());
  const auto sum = [&](const auto& term) {
    if (partition.along_lines)
      sums_by_lines<Element>(&input, shape, partition, items, channels, term, sums);
    else
      sums_by_rows<Element>(&input, shape, rows, channels, term, nullptr, sums);
  };
  if (choose_shifts<Element, kRelu>(input, shape, rows, channels, shift))
    sum(ShiftedMoments<kRelu>{shift});
  else
    sum(PlainMoments<kRelu>{});
  for_channels({0, channels.size()}, [&]<typename V>(i64 c) {
    set_moments(partial, channels.begin + c, count, load_as<V>(shift + c), load_as<V>(&sums.first[c]),
                load_as<V>(&sums.second[c]));
  });
}

// ---------------------------------------------------------------------------------------------------------
// Moments of a block of float64 data, in two sweeps over a packed tile (s is its first row, k its rows):
//
//   mean = s + sum(x - s) / k        M2 = sum((x - mean)^2)
//
// The second sweep makes M2 independent of how good the shift was. Sums of twice the precision beside them
// make the mean right to its last bits even where the data cancel.
// ---------------------------------------------------------------------------------------------------------
struct alignas(64) TileMoments {
  double mean[kTileChannels];
  double m2[kTileChannels];
  double sum_hi[kTileChannels];
  double sum_lo[kTileChannels];
};

// Merges `count` rows of a tile into the moments of the `before` rows already there.
inline void merge_block(const Block<double>& tile, i64 count, i64 before, i64 width, TileMoments& moments) {
  const Merge merge(before, count);
  const double rows = static_cast<double>(count);
  for (i64 c = 0; c < width; c += kWidth) {
    const Vec shift = load(&tile.at[0][c]);
    const Vec mean = shift + sum_rows(count, [&](i64 r) { return load(&tile.at[r][c]) - shift; }) / rows;
    const Vec m2 = sum_rows(count, [&](i64 r) {
      const Vec d = load(&tile.at[r][c]) - mean;
      return d * d;
    });
    Vec hi = load(&moments.sum_hi[c]);
    Vec lo = load(&moments.sum_lo[c]);
    for (i64 r = 0; r < count; ++r) add_exactly(hi, lo, load(&tile.at[r][c]));
    store(&moments.sum_hi[c], hi);
    store(&moments.sum_lo[c], lo);
    Vec merged_mean = before == 0 ? mean : load(&moments.mean[c]);
    Vec merged_m2 = before == 0 ? m2 : load(&moments.m2[c]);
    if (before != 0) merge(merged_mean, merged_m2, mean, m2);
    store(&moments.mean[c], merged_mean);
    store(&moments.m2[c], merged_m2);
  }
}

template <Relu kRelu>
void segment_moments_of_doubles(const ArrayView& input, const Shape& shape, Range rows, Range channels,
                                const Partial& partial) {
  Block<double> tile;
  TileMoments moments = {};
  for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const Range block{begin, min_of(begin + kBlockRows, rows.end)};
    pack<Float64>(input, shape, block, channels, tile);
    if constexpr (kRelu == Relu::before) rectify(tile, block.size(), channels.size());
    merge_block(tile, block.size(), begin - rows.begin, channels.size(), moments);
  }
  for (i64 c = channels.begin; c < channels.end; ++c) {
    const i64 own = c - channels.begin;
    partial.mean[c] = moments.mean[own];
    partial.m2[c] = moments.m2[own];
    partial.sum_hi[c] = moments.sum_hi[own];
    partial.sum_lo[c] = moments.sum_lo[own];
  }
}

// One segment in a tile of channels.
template <typename Element, Relu kRelu>
void moments_of(const ForwardArgs& args, const Partition& partition, const Partials& partials, i64 segment,
                Range channels) {
  const Partial partial = partial_of<Element>(partials, segment);
  if constexpr (Element::kIsDouble)
    segment_moments_of_doubles<kRelu>(args.input, args.shape, partition.rows_of(partition.segment(segment)),
                                      channels, partial);
  else
    segment_moments<Element, kRelu>(args.input, args.shape, partition, segment, channels, partial);
}

// Leaves the moments of the whole batch in the first segment's place.
template <typename Element>
void merge_segments(const Partition& partition, const Partials& partials, Range channels) {
  const auto first_row = [&](i64 segment) {
    return partition.first_row(min_of(segment * partition.segment_items, partition.items));
  };
  visit_tree(partition.segments, [&](i64 left, i64 right) {
    const i64 middle = first_row(right);
    const Merge merge(middle - first_row(left), first_row(right + right - left) - middle);
    const Partial a = partial_of<Element>(partials, left);
    const Partial b = partial_of<Element>(partials, right);
    for (i64 c = channels.begin; c < channels.end; ++c) {
      merge(a.mean[c], a.m2[c], b.mean[c], b.m2[c]);
      if constexpr (Element::kIsDouble) {
        add_exactly(a.sum_hi[c], a.sum_lo[c], b.sum_hi[c]);
        a.sum_lo[c] += b.sum_lo[c];
      }
    }
  });
  if constexpr (Element::kIsDouble) {
    const Partial whole = partial_of<Element>(partials, 0);
    const double rows = static_cast<double>(partition.rows);
    for (i64 c = channels.begin; c < channels.end; ++c)
      whole.mean[c] = refined_mean(whole.mean[c], whole.sum_hi[c], whole.sum_lo[c], rows);
  }
}

}  // namespace
}  // namespace torch_bn::kernels
