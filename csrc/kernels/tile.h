// A tile: up to kBlockRows rows of up to kTileChannels channels, converted to double and laid out with the
// channels side by side, whatever the layout of the array. It is the only place where strides matter to the
// statistics, and it keeps rows that lie a power of two apart from evicting each other.
#pragma once

#include "element.h"
#include "vec.h"

namespace torch_bn::kernels {
namespace {

struct Tile {
  alignas(64) double at[kBlockRows][kTileChannels];
};

template <typename Element>
const typename Element::Storage* element_at(const ArrayView& view, i64 n, i64 c, i64 l) {
  return static_cast<const typename Element::Storage*>(view.data) + n * view.stride_n + c * view.stride_c +
         l * view.stride_l;
}

// Channels that fill up the last vector are zero: the arithmetic runs over them and nobody reads the result.
template <typename Element>
void load_tile(const ArrayView& view, const Shape& shape, Range rows, Range channels, Tile& tile) {
  const i64 width = channels.size();
  i64 n = rows.begin / shape.l;
  i64 l = rows.begin % shape.l;
  for (i64 r = 0; r < rows.size();) {
    const i64 run = min_of(shape.l - l, rows.size() - r);  // rows of the same n
    const auto* from = element_at<Element>(view, n, channels.begin, l);
    if (view.stride_c == 1) {
      for (i64 i = 0; i < run; ++i)
        for (i64 c = 0; c < width; ++c) tile.at[r + i][c] = Element::load(from[i * view.stride_l + c]);
    } else {
      for (i64 c = 0; c < width; ++c)
        for (i64 i = 0; i < run; ++i)
          tile.at[r + i][c] = Element::load(from[c * view.stride_c + i * view.stride_l]);
    }
    r += run;
    l = 0;
    ++n;
  }
  const i64 filled = ceil_div(width, kWidth) * kWidth;
  if (width < filled)
    for (i64 r = 0; r < rows.size(); ++r)
      for (i64 c = width; c < filled; ++c) tile.at[r][c] = 0.0;
}

}  // namespace
}  // namespace torch_bn::kernels
