// How an array is cut into pieces. Everything here is a function of the shape and of which dimension lies
// innermost, never of the number of threads, so that the order of every sum is too.
//
//   item     one row (n, l), or in the order along lines a piece of one line (n, :) of at most kPiece values.
//   segment  consecutive items, summed one after the other; their number is bounded, so that scratch stays
//            small and the longest chain of roundings grows far slower than the number of rows.
//   tile     consecutive channels that are summed together; how many changes no bit.
//
// Segments are merged in a fixed binary tree.
//
// The namespace is anonymous because this header is compiled once per instruction set: a function with
// external linkage would be merged by the linker, and the baseline could end up running another set's copy.
#pragma once

#include "api.h"

namespace torch_bn::kernels {
namespace {

using i64 = std::int64_t;

// Rows of a packed block: a tile of them stays in a core's own cache.
constexpr i64 kBlockRows = 128;
// Channels of a packed block, and of a tile whose sums are held in registers.
constexpr i64 kTileChannels = 64;
constexpr i64 kMaxSegments = 64;
// A segment's partial sums cost some rows' work, and along lines more. Segments of rows are multiples of the
// first: where means of an even number of rows are exact, those of the segments then are.
constexpr i64 kMinSegmentRows = 128;
constexpr i64 kMinSegmentOfLines = 1024;
constexpr i64 kPiece = 4096;
// Lines shorter than this are summed row by row, because they would not fill the lanes.
constexpr i64 kMinLine = 32;
// Doubles a channel: of a segment's partial sums, and enough for all coefficients behind them, some of which are
// floats or bytes.
constexpr i64 kForwardPartials = 4;
constexpr i64 kBackwardPartials = 2;
constexpr i64 kForwardCoefficients = 5;
constexpr i64 kBackwardCoefficients = 8;
// Room, in doubles, for each array of coefficients to start at a cache line.
constexpr i64 kAlignmentRoom = 104;  // at most twelve arrays
// Elements below which a second thread costs more than it brings.
constexpr i64 kSerialBelow = 24576;

constexpr i64 ceil_div(i64 a, i64 b) {
  return (a + b - 1) / b;
}
constexpr i64 round_up(i64 a, i64 b) {
  return ceil_div(a, b) * b;
}
constexpr i64 min_of(i64 a, i64 b) {
  return a < b ? a : b;
}
constexpr i64 max_of(i64 a, i64 b) {
  return a > b ? a : b;
}

struct Range {
  i64 begin;
  i64 end;
  constexpr i64 size() const { return end - begin; }
};

// Whether sums run along lines (n, c, :) or across the channels, row by row. The input alone decides: a
// gradient of another layout must not change the bits.
inline bool sums_run_along_lines(const Shape& shape, const ArrayView& input) {
  if (shape.l < kMinLine) return false;
  const auto magnitude = [](i64 stride) { return stride < 0 ? -stride : stride; };
  return magnitude(input.stride_l) <= magnitude(input.stride_c) || shape.c == 1;
}

struct Partition {
  bool along_lines;
  i64 l;
  i64 pieces;  // of a line
  i64 rows;
  i64 items;
  i64 segment_items;
  i64 segments;

  constexpr Partition(const Shape& shape, bool lines)
      : along_lines(lines),
        l(shape.l),
        pieces(lines ? ceil_div(shape.l, kPiece) : 1),
        rows(shape.n * shape.l),
        items(lines ? shape.n * pieces : rows),
        segment_items(lines
                          ? max_of(ceil_div(items, kMaxSegments),
                                   ceil_div(kMinSegmentOfLines, max_of(min_of(shape.l, kPiece), 1)))
                          : max_of(ceil_div(ceil_div(items, kMaxSegments), kMinSegmentRows), 1) * kMinSegmentRows),
        segments(ceil_div(items, segment_items)) {}

  constexpr Range segment(i64 s) const { return {s * segment_items, min_of((s + 1) * segment_items, items)}; }

  // The number of the first row of an item; rows are numbered n * l + position.
  constexpr i64 first_row(i64 item) const {
    return along_lines ? item / pieces * l + min_of(item % pieces * kPiece, l) : item;
  }
  constexpr Range rows_of(Range some) const { return {first_row(some.begin), first_row(some.end)}; }
};

// Hands out arrays of a buffer, each from the start of a cache line on.
class Arrays {
 public:
  explicit Arrays(void* buffer) : next_(reinterpret_cast<std::uintptr_t>(buffer)) {}

  template <typename T>
  T* take(i64 count) {
    const std::uintptr_t begin = (next_ + 63) / 64 * 64;
    next_ = begin + static_cast<std::uintptr_t>(count) * sizeof(T);
    return reinterpret_cast<T*>(begin);
  }

 private:
  std::uintptr_t next_;
};

// Calls visit(left, right) for every merge of the tree over `count` leaves; the result ends in leaf 0.
template <typename Visit>
void visit_tree(i64 count, Visit visit) {
  for (i64 step = 1; step < count; step *= 2)
    for (i64 left = 0; left + step < count; left += 2 * step) visit(left, left + step);
}

}  // namespace
}  // namespace torch_bn::kernels
