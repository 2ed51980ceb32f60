// Forward: statistics of the batch, running statistics, normalised output.
#pragma once

#include "channels.h"
#include "elementwise.h"
#include "exact_sum.h"
#include "vec.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Moments of a block, in two sweeps over a tile (s is the block's first row, k its number of rows):
//
//   mean = s + sum(x - s) / k        M2 = sum((x - mean)^2)
//
// The shift makes a constant channel's mean exact; the second sweep makes M2 independent of how good the
// shift was, so that an outlier in the first row does no harm.
//
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

struct alignas(64) TileMoments {
  double mean[kTileChannels];
  double m2[kTileChannels];
  double sum_hi[kTileChannels];  // of float64 data only
  double sum_lo[kTileChannels];
};

// Merges `count` rows of a tile into the moments of the `before` rows already there.
inline void merge_block(const Tile& tile, i64 count, i64 before, i64 width, TileMoments& moments) {
  const Merge merge(before, count);
  const double rows = static_cast<double>(count);
  for (i64 c = 0; c < width; c += kWidth) {
    const Vec shift = load(&tile.at[0][c]);
    const Vec mean = shift + sum_rows(count, [&](i64 r) { return load(&tile.at[r][c]) - shift; }) / rows;
    const Vec m2 = sum_rows(count, [&](i64 r) {
      const Vec d = load(&tile.at[r][c]) - mean;
      return d * d;
    });
    if (before == 0) {
      store(&moments.mean[c], mean);
      store(&moments.m2[c], m2);
      continue;
    }
    Vec merged_mean = load(&moments.mean[c]);
    Vec merged_m2 = load(&moments.m2[c]);
    merge(merged_mean, merged_m2, mean, m2);
    store(&moments.mean[c], merged_mean);
    store(&moments.m2[c], merged_m2);
  }
}

inline void add_block_exactly(const Tile& tile, i64 count, i64 width, TileMoments& moments) {
  for (i64 c = 0; c < width; c += kWidth) {
    Vec hi = load(&moments.sum_hi[c]);
    Vec lo = load(&moments.sum_lo[c]);
    for (i64 r = 0; r < count; ++r) add_exactly(hi, lo, load(&tile.at[r][c]));
    store(&moments.sum_hi[c], hi);
    store(&moments.sum_lo[c], lo);
  }
}

// The moments of a segment as they lie in scratch, each an array over the channels.
struct Partial {
  double* mean;
  double* m2;
  double* sum_hi;
  double* sum_lo;
  Partial(double* scratch, i64 segment, i64 channels)
      : mean(scratch + kForwardPartials * segment * channels),
        m2(mean + channels),
        sum_hi(m2 + channels),
        sum_lo(sum_hi + channels) {}
};

// Moments of one segment of rows in one tile of channels.
template <typename Element>
void segment_moments(const ForwardArgs& args, Range rows, Range channels, const Partial& partial) {
  Tile tile;
  TileMoments moments = {};
  for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const Range block{begin, min_of(begin + kBlockRows, rows.end)};
    load_tile<Element>(args.input, args.shape, block, channels, tile);
    merge_block(tile, block.size(), begin - rows.begin, channels.size(), moments);
    if constexpr (Element::kIsDouble) add_block_exactly(tile, block.size(), channels.size(), moments);
  }
  for (i64 c = channels.begin; c < channels.end; ++c) {
    const i64 own = c - channels.begin;
    partial.mean[c] = moments.mean[own];
    partial.m2[c] = moments.m2[own];
    if constexpr (Element::kIsDouble) {
      partial.sum_hi[c] = moments.sum_hi[own];
      partial.sum_lo[c] = moments.sum_lo[own];
    }
  }
}

// Scratch: [segments][four moments][C], then [scale, bias][C] coefficients.
struct ForwardScratch {
  double* partial;
  double* scale;
  double* bias;
  ForwardScratch(const ForwardArgs& args, const Partition& partition)
      : partial(args.scratch),
        scale(partial + kForwardPartials * partition.segments * partition.channels),
        bias(scale + partition.channels) {}
};

// Leaves the moments of the whole batch in the first segment's place.
template <typename Element>
void batch_moments(const Team& team, const ForwardArgs& args, const Partition& partition, double* scratch) {
  const i64 channels = partition.channels;
  const Range tasks = team.share(partition.segments * partition.tiles);
  for (i64 task = tasks.begin; task < tasks.end; ++task) {
    const i64 s = task / partition.tiles;
    segment_moments<Element>(args, partition.segment(s), partition.tile(task % partition.tiles),
                             Partial(scratch, s, channels));
  }
  team.barrier();
  const Range own = team.share(channels);
  visit_tree(partition.segments, [&](i64 left, i64 right) {
    // Every segment but the last is full, and so is every subtree but the last.
    const i64 step = right - left;
    const i64 middle = right * partition.segment_rows;
    const i64 end = min_of((right + step) * partition.segment_rows, partition.rows);
    const Merge merge(middle - left * partition.segment_rows, end - middle);
    const Partial a(scratch, left, channels);
    const Partial b(scratch, right, channels);
    for (i64 c = own.begin; c < own.end; ++c) {
      merge(a.mean[c], a.m2[c], b.mean[c], b.m2[c]);
      if constexpr (Element::kIsDouble) {
        add_exactly(a.sum_hi[c], a.sum_lo[c], b.sum_hi[c]);
        a.sum_lo[c] += b.sum_lo[c];
      }
    }
  });
  if constexpr (Element::kIsDouble) {
    const Partial whole(scratch, 0, channels);
    const double rows = static_cast<double>(partition.rows);
    for (i64 c = own.begin; c < own.end; ++c)
      whole.mean[c] = refined_mean(whole.mean[c], whole.sum_hi[c], whole.sum_lo[c], rows);
  }
}

// ---------------------------------------------------------------------------------------------------------
// Running statistics (m = momentum, n = rows; the running variance is the unbiased one):
//
//   running_mean = (1 - m) * running_mean + m * mean
//   running_var  = (1 - m) * running_var  + m * M2 / (n - 1)
// ---------------------------------------------------------------------------------------------------------
template <typename Param>
void update_running(const ForwardArgs& args, i64 c, double mean, double unbiased_var) {
  auto update = [&](const ChannelView& view, double value) {
    if (view.data == nullptr) return;
    const double old = read_channel<Param>(view, c, 0.0);
    write_channel<Param>(view.data, c * view.stride, (1.0 - args.momentum) * old + args.momentum * value);
  };
  update(args.running_mean, mean);
  update(args.running_var, unbiased_var);
}

// ---------------------------------------------------------------------------------------------------------
// Normalisation (Ioffe and Szegedy 2015, algorithm 1), centred before it is scaled, because x * a + b cancels:
//
//   invstd = 1 / sqrt(M2 / n + eps)        y = (x - mean) * (invstd * weight) + bias
// ---------------------------------------------------------------------------------------------------------
template <typename Element, typename Param>
void forward(const ForwardArgs& args) {
  const Partition partition(args.shape);
  const ForwardScratch scratch(args, partition);
  run_team(args.threads, partition.rows * partition.channels, [&](const Team& team) {
    if (args.training) batch_moments<Element>(team, args, partition, scratch.partial);
    const double rows = static_cast<double>(partition.rows);
    const Range own = team.share(partition.channels);
    for (i64 c = own.begin; c < own.end; ++c) {
      double var;
      if (args.training) {
        const Partial whole(scratch.partial, 0, partition.channels);
        const double m2 = whole.m2[c];
        args.mean[c] = whole.mean[c];
        var = m2 / rows;
        update_running<Param>(args, c, args.mean[c], m2 / (rows - 1.0));
      } else {
        args.mean[c] = read_channel<Param>(args.running_mean, c, 0.0);
        var = read_channel<Param>(args.running_var, c, 1.0);
      }
      args.invstd[c] = 1.0 / __builtin_sqrt(var + args.eps);
      scratch.scale[c] = args.invstd[c] * read_channel<Param>(args.weight, c, 1.0);
      scratch.bias[c] = read_channel<Param>(args.bias, c, 0.0);
    }
    team.barrier();
    const double* mean = args.mean;
    const double* scale = scratch.scale;
    const double* bias = scratch.bias;
    for_each_element<Element>(
        team, args.shape, args.output, [=](i64 c, double x) { return (x - mean[c]) * scale[c] + bias[c]; },
        args.input);
  });
}

}  // namespace
}  // namespace torch_bn::kernels
