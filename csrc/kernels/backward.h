// Backward: the two sums per channel, the parameters' gradients, grad_input.
#pragma once

#include "channels.h"
#include "elementwise.h"
#include "vec.h"

namespace torch_bn::kernels {
namespace {

// ---------------------------------------------------------------------------------------------------------
// Sums over the rows (g is grad_output):
//
//   dot = sum(g * (x - mean))        total = sum(g)
// ---------------------------------------------------------------------------------------------------------
struct alignas(64) TileSums {
  double total[kTileChannels];
  double dot[kTileChannels];
};

inline void add_block(const Tile& grad, const Tile& input, i64 count, i64 width, const double* mean,
                      TileSums& sums) {
  for (i64 c = 0; c < width; c += kWidth) {
    const Vec centre = load(mean + c);
    const Vec total = sum_rows(count, [&](i64 r) { return load(&grad.at[r][c]); });
    const Vec dot =
        sum_rows(count, [&](i64 r) { return load(&grad.at[r][c]) * (load(&input.at[r][c]) - centre); });
    store(&sums.total[c], load(&sums.total[c]) + total);
    store(&sums.dot[c], load(&sums.dot[c]) + dot);
  }
}

// Sums of one segment in one tile, to partial[0 .. C) (total) and partial[C .. 2C) (dot).
template <typename Element>
void segment_sums(const BackwardArgs& args, Range rows, Range channels, double* partial) {
  Tile grad;
  Tile input;
  TileSums sums = {};
  alignas(64) double mean[kTileChannels] = {};
  for (i64 c = channels.begin; c < channels.end; ++c) mean[c - channels.begin] = args.mean[c];
  for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
    const Range block{begin, min_of(begin + kBlockRows, rows.end)};
    load_tile<Element>(args.grad_output, args.shape, block, channels, grad);
    load_tile<Element>(args.input, args.shape, block, channels, input);
    add_block(grad, input, block.size(), channels.size(), mean, sums);
  }
  for (i64 c = channels.begin; c < channels.end; ++c) {
    partial[c] = sums.total[c - channels.begin];
    partial[args.shape.c + c] = sums.dot[c - channels.begin];
  }
}

// Leaves the sums of the whole batch in partial[0 .. 2C).
template <typename Element>
void batch_sums(const Team& team, const BackwardArgs& args, const Partition& partition, double* partial) {
  const i64 channels = partition.channels;
  const Range tasks = team.share(partition.segments * partition.tiles);
  for (i64 task = tasks.begin; task < tasks.end; ++task) {
    const i64 s = task / partition.tiles;
    segment_sums<Element>(args, partition.segment(s), partition.tile(task % partition.tiles),
                          partial + kBackwardPartials * s * channels);
  }
  team.barrier();
  const Range own = team.share(channels);
  visit_tree(partition.segments, [&](i64 left, i64 right) {
    double* a = partial + kBackwardPartials * left * channels;
    const double* b = partial + kBackwardPartials * right * channels;
    for (i64 c = own.begin; c < own.end; ++c) {
      a[c] += b[c];
      a[channels + c] += b[channels + c];
    }
  });
}

// Scratch: [segments][total, dot][C] partial sums, then [three][C] coefficients of grad_input.
struct BackwardScratch {
  double* partial;
  double* shift;
  double* slope;
  double* scale;
  BackwardScratch(const BackwardArgs& args, const Partition& partition)
      : partial(args.scratch),
        shift(partial + kBackwardPartials * partition.segments * partition.channels),
        slope(shift + partition.channels),
        scale(slope + partition.channels) {}
};

// ---------------------------------------------------------------------------------------------------------
// Gradients (Ioffe and Szegedy 2015, section 3, with the sums collected; n = rows):
//
//   grad_bias   = total
//   grad_weight = dot * invstd
//   grad_input  = (g - total / n - (x - mean) * (dot * invstd^2 / n)) * (invstd * weight)   in training
//   grad_input  = g * (invstd * weight)                                                      in evaluation
// ---------------------------------------------------------------------------------------------------------
template <typename Element, typename Param>
void backward(const BackwardArgs& args) {
  const Partition partition(args.shape);
  const BackwardScratch scratch(args, partition);
  const bool needs_sums =
      args.grad_weight != nullptr || args.grad_bias != nullptr || (args.training && args.grad_input != nullptr);
  run_team(args.threads, partition.rows * partition.channels, [&](const Team& team) {
    if (needs_sums) batch_sums<Element>(team, args, partition, scratch.partial);
    const double rows = static_cast<double>(partition.rows);
    const Range own = team.share(partition.channels);
    for (i64 c = own.begin; c < own.end; ++c) {
      const double invstd = args.invstd[c];
      scratch.scale[c] = invstd * read_channel<Param>(args.weight, c, 1.0);
      if (!needs_sums) continue;
      const double total = partition.segments == 0 ? 0.0 : scratch.partial[c];
      const double dot = partition.segments == 0 ? 0.0 : scratch.partial[partition.channels + c];
      scratch.shift[c] = total / rows;
      scratch.slope[c] = dot * invstd * invstd / rows;
      if (args.grad_weight != nullptr) write_channel<Param>(args.grad_weight, c, dot * invstd);
      if (args.grad_bias != nullptr) write_channel<Param>(args.grad_bias, c, total);
    }
    if (args.grad_input == nullptr) return;
    team.barrier();
    const double* mean = args.mean;
    const double* shift = scratch.shift;
    const double* slope = scratch.slope;
    const double* scale = scratch.scale;
    if (args.training) {
      for_each_element<Element>(
          team, args.shape, args.grad_input,
          [=](i64 c, double g, double x) { return (g - shift[c] - (x - mean[c]) * slope[c]) * scale[c]; },
          args.grad_output, args.input);
    } else {
      for_each_element<Element>(
          team, args.shape, args.grad_input, [=](i64 c, double g) { return g * scale[c]; }, args.grad_output);
    }
  });
}

}  // namespace
}  // namespace torch_bn::kernels
