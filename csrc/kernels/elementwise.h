// Visits every element once and writes a contiguous (N, C, L) result: the common frame of normalising and of
// grad_input. The result of an element does not depend on the order of the visit, so the work is shared out
// by what suits the layout and the number of threads.
#pragma once

#include "team.h"
#include "tile.h"

namespace torch_bn::kernels {
namespace {

// Rows and channels of a piece; the per-channel coefficients of one piece stay in the first-level cache.
constexpr i64 kPieceRows = 32;
constexpr i64 kPieceChannels = 256;

// A layout in which the innermost dimension of the result is also the innermost of every operand.
template <typename... Views>
bool runs_along_channels(const Shape& shape, const Views&... views) {
  return shape.l == 1 && ((views.stride_c == 1) && ...);
}
template <typename... Views>
bool runs_along_length(const Shape& shape, const Views&... views) {
  return shape.l > 1 && ((views.stride_l == 1) && ...);
}

// out[n, c, l] = store(op(c, load(view[n, c, l])...)); op returns a double.
template <typename Element, typename Op, typename... Views>
void for_each_element(const Team& team, const Shape& shape, void* out, Op op, const Views&... views) {
  auto* result = static_cast<typename Element::Storage*>(out);
  if (runs_along_length(shape, views...)) {
    const Range lines = team.share(shape.n * shape.c);
    for (i64 line = lines.begin; line < lines.end; ++line) {
      const i64 n = line / shape.c;
      const i64 c = line % shape.c;
      auto* to = result + line * shape.l;
      auto along = [&](const auto*... from) {
#pragma omp simd
        for (i64 l = 0; l < shape.l; ++l) to[l] = Element::store(op(c, Element::load(from[l])...));
      };
      along(element_at<Element>(views, n, c, 0)...);
    }
    return;
  }
  const bool along_channels = runs_along_channels(shape, views...);
  const i64 rows = shape.n * shape.l;
  const i64 row_pieces = ceil_div(rows, kPieceRows);
  const i64 channel_pieces = ceil_div(shape.c, kPieceChannels);
  const Range pieces = team.share(row_pieces * channel_pieces);
  for (i64 piece = pieces.begin; piece < pieces.end; ++piece) {
    const i64 first_row = piece / channel_pieces * kPieceRows;
    const i64 last_row = min_of(first_row + kPieceRows, rows);
    const i64 first = piece % channel_pieces * kPieceChannels;
    const i64 last = min_of(first + kPieceChannels, shape.c);
    if (along_channels) {
      for (i64 n = first_row; n < last_row; ++n) {
        auto* to = result + n * shape.c;
        auto along = [&](const auto*... from) {
#pragma omp simd
          for (i64 c = first; c < last; ++c) to[c] = Element::store(op(c, Element::load(from[c])...));
        };
        along(element_at<Element>(views, n, 0, 0)...);
      }
    } else {
      for (i64 c = first; c < last; ++c)
        for (i64 r = first_row; r < last_row; ++r) {
          const i64 n = r / shape.l;
          const i64 l = r % shape.l;
          result[(n * shape.c + c) * shape.l + l] =
              Element::store(op(c, Element::load(*element_at<Element>(views, n, c, l))...));
        }
    }
  }
}

}  // namespace
}  // namespace torch_bn::kernels
