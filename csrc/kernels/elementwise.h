// Visits every element once and writes a contiguous (N, C, L) result: the common frame of normalising and of
// grad_input. The result of an element does not depend on the order of the visit.
//
// An operation comes twice. In the type of the elements it serves every channel whose coefficients leave
// float32 enough range ("plain" channels, see channels.h); in double it serves the others.
#pragma once

#include "channels.h"
#include "team.h"
#include "tile.h"

namespace torch_bn::kernels {
namespace {

// Rows that share one load of the coefficients.
constexpr i64 kRowsAtOnce = 4;
// In cache, rows of so many channels go one at a time: several rows that lie a multiple of 4 KiB apart would fill
// a set of the first-level cache.
constexpr i64 kWideRow = 768;
// Channels whose coefficients stay in the first-level cache.
constexpr i64 kPieceChannels = 1024;
// Elements of a piece: so many that the processor foresees its memory, though the pieces go backwards.
constexpr i64 kPieceElements = 262144;
// Elements to fetch ahead of rows that bypass the caches, several at once.
constexpr i64 kElementsAhead = 256;
// The same of rows one after the other: the processor does not foresee the next page.
constexpr i64 kPageAhead = 1024;

// A unit of work is a row of a matrix, or a piece of the N * C lines' positions [0, L).
inline i64 pieces_of_line(const Shape& shape) {
  return ceil_div(shape.l, kPiece);
}
inline i64 units_of(const Shape& shape) {
  return shape.n * pieces_of_line(shape);
}

template <typename RealOp, typename DoubleOp>
struct Operation {
  RealOp real;
  DoubleOp in_double;
  const std::uint8_t* plain;  // of each channel
  bool stream;                // whether the result bypasses the caches
};
template <typename RealOp, typename DoubleOp>
Operation(RealOp, DoubleOp, const std::uint8_t*, bool) -> Operation<RealOp, DoubleOp>;

template <bool kFirst, typename A, typename B>
const auto& select(const A& first, const B& second) {
  if constexpr (kFirst)
    return first;
  else
    return second;
}

inline bool all_plain(const std::uint8_t* plain, Range channels) {
  return __builtin_memchr(plain + channels.begin, 0, static_cast<std::size_t>(channels.size())) == nullptr;
}

template <typename Element, typename Op>
void apply_one(const Op& op, i64 c, typename Element::Storage* to, const auto*... from) {
  using Real = typename Element::Real;
  *to = op.plain[c] ? Element::store(op.real.template at<Real>(c)(Element::load(*from)...))
                    : Element::store(static_cast<Real>(
                          op.in_double.template at<double>(c)(static_cast<double>(Element::load(*from))...)));
}

template <typename Element, bool kStream, typename Vector>
inline void put(typename Element::Storage* to, Vector v) {
  if constexpr (kStream)
    Element::stream_vector(to, v);
  else
    Element::store_vector(to, v);
}

// kRows rows over some channels; `to` is the first row of the result, `stride` the distance to the next.
template <typename Element, int kRows, bool kStream, i64 kAhead = (kRows > 1 ? kElementsAhead : 0), typename Op,
          typename... Source>
void apply_rows(const Op& op, Range channels, typename Element::Storage* to, i64 stride, Source... source) {
  using Vector = typename Element::Vector;
  constexpr i64 kStep = sizeof(Vector) / sizeof(typename Element::Real);
  const auto real = op.real;  // a copy of its own, which no store can be thought to change
  const auto vectors_at = [&](i64 c) {
    const auto f = real.template at<Vector>(c);
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kStream && kAhead > 0) (fetch_line(source.data + i * source.stride + c + kAhead), ...);
      put<Element, kStream>(to + i * stride + c, f(Element::load_vector(source.data + i * source.stride + c)...));
    }
  };
  i64 c = channels.begin;
  for (; c + kStep <= channels.end; c += kStep) vectors_at(c);
  // The rest once more with some of what is done already, unless that lies where its operands lay.
  if (!kStream && c < channels.end && channels.size() >= kStep && ((source.data != to) && ...)) {
    vectors_at(channels.end - kStep);
    return;
  }
  for (; c < channels.end; ++c) {
    const auto f = real.template at<typename Element::Real>(c);
    for (int i = 0; i < kRows; ++i)
      to[i * stride + c] = Element::store(f(Element::load(source.data[i * source.stride + c])...));
  }
}

template <typename Element, bool kStream, typename Op, typename... Views>
void apply_matrix_piece(const Op& op, const Shape& shape, Range rows, Range channels,
                        typename Element::Storage* out, const Views&... views) {
  if (!all_plain(op.plain, channels)) {
    for (i64 n = rows.begin; n < rows.end; ++n)
      for (i64 c = channels.begin; c < channels.end; ++c)
        apply_one<Element>(op, c, out + n * shape.c + c, element_at<Element>(views, n, c, 0)...);
    return;
  }
  i64 n = rows.begin;
  // Past the caches, rows of one operand are written one after the other, and of two if they are whole or narrow.
  const bool narrow = channels.size() * i64{sizeof...(views)} <= kPieceChannels;
  const bool in_order =
      kStream ? sizeof...(views) == 1 || channels.size() == shape.c || narrow : channels.size() >= kWideRow;
  for (; !in_order && n + kRowsAtOnce <= rows.end; n += kRowsAtOnce)
    apply_rows<Element, kRowsAtOnce, kStream>(op, channels, out + n * shape.c, shape.c,
                                              plain_rows<Element>(views, shape, n, 0)...);
  const auto each_row = [&]<i64 kAhead>() {
    for (; n < rows.end; ++n)
      apply_rows<Element, 1, kStream, kAhead>(op, channels, out + n * shape.c, shape.c,
                                              plain_rows<Element>(views, shape, n, 0)...);
  };
  if (kStream && channels.size() > kPieceChannels)
    each_row.template operator()<kStream ? kPageAhead : 0>();
  else
    each_row.template operator()<0>();
}

template <typename Element, bool kStream, typename Op>
void apply_line(const Op& op, i64 c, i64 length, typename Element::Storage* to, const auto*... from) {
  using Vector = typename Element::Vector;
  using Real = typename Element::Real;
  constexpr i64 kStep = sizeof(Vector) / sizeof(Real);
  if (!op.plain[c]) {
    for (i64 i = 0; i < length; ++i) apply_one<Element>(op, c, to + i, from + i...);
    return;
  }
  const auto wide = op.real.template along<Vector>(c);
  const auto narrow = op.real.template at<Real>(c);
  i64 i = 0;
  for (; i + kStep <= length; i += kStep) put<Element, kStream>(to + i, wide(Element::load_vector(from + i)...));
  for (; i < length; ++i) to[i] = Element::store(narrow(Element::load(from[i])...));
}

template <typename Element, bool kStream, typename Op, typename... Views>
void apply(const Op& op, const Shape& shape, Range units, Range channels, typename Element::Storage* out,
           const Views&... views) {
  if (shape.l == 1 && ((views.stride_c == 1) && ...)) {
    // From the end: what was summed last is still in a cache.
    const i64 piece_rows = max_of(kPieceElements / channels.size(), kRowsAtOnce);
    // Past the caches, the rows of one operand go as they lie, as a copy would. A channel that needs double costs
    // its piece only.
    const bool whole = kStream && sizeof...(views) == 1 && all_plain(op.plain, channels);
    const i64 width = whole ? channels.size() : kPieceChannels;
    for (i64 end = units.end; end > units.begin;) {
      const Range rows{max_of(units.begin, end - piece_rows), end};
      for (i64 c = channels.begin; c < channels.end; c += width)
        apply_matrix_piece<Element, kStream>(op, shape, rows, {c, min_of(c + width, channels.end)}, out, views...);
      end = rows.begin;
    }
    return;
  }
  const i64 pieces = pieces_of_line(shape);
  const bool along_lines = ((views.stride_l == 1) && ...);
  for (i64 unit = units.end - 1; unit >= units.begin; --unit) {
    const i64 n = unit / pieces;
    const i64 begin = unit % pieces * kPiece;
    const i64 length = min_of(shape.l - begin, kPiece);
    for (i64 c = channels.begin; c < channels.end; ++c) {
      auto* to = out + (n * shape.c + c) * shape.l + begin;
      if (along_lines && shape.l > 1) {
        apply_line<Element, kStream>(op, c, length, to, element_at<Element>(views, n, c, begin)...);
      } else {
        for (i64 i = 0; i < length; ++i)
          apply_one<Element>(op, c, to + i, element_at<Element>(views, n, c, begin + i)...);
      }
    }
  }
}

// Whether vectors of the result lie at addresses that a streaming store can take.
template <typename Element>
bool can_stream(const Shape& shape, const void* out) {
  const i64 line = (shape.l == 1 ? shape.c : shape.l) * static_cast<i64>(sizeof(typename Element::Storage));
  return line % 64 == 0 && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
}

// out[n, c, l] = op(c, view[n, c, l]...) over some units and channels. The first channel of a
// matrix is a multiple of 16, so that its vectors can be streamed; for lines can_stream() sees to that.
template <typename Element, typename Op, typename... Views>
void for_each_element(const Op& op, const Shape& shape, Range units, Range channels, void* out,
                      const Views&... views) {
  auto* to = static_cast<typename Element::Storage*>(out);
  if (op.stream) {
    apply<Element, true>(op, shape, units, channels, to, views...);
    end_of_streaming();
  } else {
    apply<Element, false>(op, shape, units, channels, to, views...);
  }
}

}  // namespace
}  // namespace torch_bn::kernels
