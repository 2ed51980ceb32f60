// Access to an array as rows with the channels side by side, whatever its layout: in place where they lie so,
// else through a packed copy of a block. Lines of one channel are read in lines.h.
#pragma once

#include "element.h"

namespace torch_bn::kernels {
namespace {

template <typename Element>
const typename Element::Storage* element_at(const ArrayView& view, i64 n, i64 c, i64 l) {
  return static_cast<const typename Element::Storage*>(view.data) + n * view.stride_n + c * view.stride_c +
         l * view.stride_l;
}

// Into the second-level cache, as GCC's locality 2 means: the first holds too little of what is fetched ahead.
inline void fetch_line(const void* address) {
  __builtin_prefetch(address, /*write=*/0, /*locality=*/2);
}

// Equally distant rows, channels side by side; row r starts at `data + r * stride`.
template <typename Storage>
struct Rows {
  const Storage* data;
  i64 stride;
};

// Calls visit(r, count, from, step) for runs of rows at equal distances, r counted from the first one.
template <typename Element, typename Visit>
void for_each_run(const ArrayView& view, const Shape& shape, Range rows, i64 channel, Visit visit) {
  if (shape.l == 1) {
    visit(i64{0}, rows.size(), element_at<Element>(view, rows.begin, channel, 0), view.stride_n);
    return;
  }
  i64 n = rows.begin / shape.l;
  i64 l = rows.begin % shape.l;
  for (i64 r = 0; r < rows.size(); ++n, l = 0) {
    const i64 count = min_of(shape.l - l, rows.size() - r);
    visit(r, count, element_at<Element>(view, n, channel, l), view.stride_l);
    r += count;
  }
}

// A packed block of rows.
template <typename T>
struct alignas(64) Block {
  T at[kBlockRows][kTileChannels];
};

// Channels that fill up the last vector are zero: the arithmetic runs over them and nobody reads the result.
template <typename Element, typename Storage = typename Element::Storage>
void pack(const ArrayView& view, const Shape& shape, Range rows, Range channels, Block<Storage>& block) {
  const i64 width = channels.size();
  for_each_run<Element>(view, shape, rows, channels.begin, [&](i64 r, i64 count, const Storage* from, i64 step) {
    if (view.stride_c == 1) {
      for (i64 i = 0; i < count; ++i)
        for (i64 c = 0; c < width; ++c) block.at[r + i][c] = from[i * step + c];
    } else {
      for (i64 c = 0; c < width; ++c)
        for (i64 i = 0; i < count; ++i) block.at[r + i][c] = from[c * view.stride_c + i * step];
    }
  });
  const i64 filled = round_up(width, kWidth);
  for (i64 r = 0; width < filled && r < rows.size(); ++r)
    for (i64 c = width; c < filled; ++c) block.at[r][c] = Storage{};
}

// Whether all rows lie at one distance from each other, channels side by side.
inline bool has_plain_rows(const ArrayView& view, const Shape& shape) {
  return view.stride_c == 1 && (shape.l == 1 || shape.n == 1 || view.stride_n == shape.l * view.stride_l);
}

template <typename Element>
Rows<typename Element::Storage> plain_rows(const ArrayView& view, const Shape& shape, i64 row, i64 channel) {
  const i64 stride = shape.l == 1 ? view.stride_n : view.stride_l;
  return {static_cast<const typename Element::Storage*>(view.data) + row * stride + channel, stride};
}

}  // namespace
}  // namespace torch_bn::kernels
