// How rows and channels are cut into pieces. Everything here is a function of the shape alone, so that the
// order of every sum is too.
//
//   block    kBlockRows consecutive rows: a tile of them stays in a core's cache between two sweeps.
//   segment  consecutive blocks, merged one after the other; the unit of work that a thread takes.
//   tile     kTileChannels consecutive channels.
//
// Segments are merged in a fixed binary tree. Their number is bounded, so that scratch stays small and the
// longest chain of roundings grows far slower than the number of rows.
//
// The namespace is anonymous because this header is compiled once per instruction set: a function with
// external linkage would be merged by the linker, and the baseline could end up running another set's copy.
#pragma once

#include "api.h"

namespace torch_bn::kernels {
namespace {

using i64 = std::int64_t;

constexpr i64 kBlockRows = 128;
constexpr i64 kTileChannels = 32;
constexpr i64 kMaxSegments = 64;
// Independent partial sums inside a block: row r goes to lane r mod kLanes, in every layout and on every
// instruction set. Eight hide the latency of an addition.
constexpr int kLanes = 8;
// Arrays over the channels that a segment leaves in scratch, and those of the coefficients behind them.
constexpr i64 kForwardPartials = 4;
constexpr i64 kForwardCoefficients = 2;
constexpr i64 kBackwardPartials = 2;
constexpr i64 kBackwardCoefficients = 3;
// Elements below which a second thread costs more than it brings.
constexpr i64 kSerialBelow = 16384;

constexpr i64 ceil_div(i64 a, i64 b) {
  return (a + b - 1) / b;
}
constexpr i64 min_of(i64 a, i64 b) {
  return a < b ? a : b;
}

struct Range {
  i64 begin;
  i64 end;
  constexpr i64 size() const { return end - begin; }
};

struct Partition {
  i64 rows;
  i64 channels;
  i64 segment_rows;
  i64 segments;
  i64 tiles;

  explicit constexpr Partition(const Shape& shape)
      : rows(shape.n * shape.l),
        channels(shape.c),
        segment_rows(ceil_div(ceil_div(rows, kBlockRows), kMaxSegments) * kBlockRows),
        segments(rows == 0 ? 0 : ceil_div(rows, segment_rows)),
        tiles(ceil_div(shape.c, kTileChannels)) {}

  constexpr Range segment(i64 s) const { return {s * segment_rows, min_of((s + 1) * segment_rows, rows)}; }
  constexpr Range tile(i64 t) const { return {t * kTileChannels, min_of((t + 1) * kTileChannels, channels)}; }
};

// Calls visit(left, right) for every merge of the tree over `count` leaves; the result ends in leaf 0.
template <typename Visit>
void visit_tree(i64 count, Visit visit) {
  for (i64 step = 1; step < count; step *= 2)
    for (i64 left = 0; left + step < count; left += 2 * step) visit(left, left + step);
}

}  // namespace
}  // namespace torch_bn::kernels
