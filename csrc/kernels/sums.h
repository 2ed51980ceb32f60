// Two sums per channel over a segment of rows, in double, in one sweep; the frame of both directions, for data
// narrower than double. What is summed is a Term, which may know something of each channel: its `at(c)` holds that
// for a vector of channels (of a tile, counted from its first), its `along(c)` for lines of one channel.
//
// Every channel's values are added one after the other along the rows; lines are summed in lines.h.
#pragma once

#include <cstddef>
#include <type_traits>

#include "tile.h"

namespace torch_bn::kernels {
namespace {

// Channels whose sums, with what a term knows of them, stay in the first-level cache.
constexpr i64 kWideTile = 1024;
// More channels than the registers hold sums of are summed a few rows at a time, as many runs of memory as the
// processor follows, with so many vectors of sums in registers meanwhile.
constexpr i64 kRowsOfSums = 4;
constexpr int kVectorsOfSums = 4;
// Rows to fetch ahead: they lie too far apart for the processor to foresee the next. Into the second-level cache:
// the first holds too few of them, and there they drive out what is being read. With 1,024 channels it costs a
// twentieth of the sums' time where two operands are in a cache already, and saves up to a fifth where they are
// not.
constexpr i64 kWideFetchAhead = 8;
constexpr i64 kFetchAhead = 16;

struct alignas(64) TileSums {
  double first[kWideTile];
  double second[kWideTile];

  explicit TileSums(i64 channels) {
    for (i64 c = 0; c < channels; c += kWidth) {
      store(first + c, Vec{});
      store(second + c, Vec{});
    }
  }
};

template <typename Storage>
inline void fetch(const Storage* from, i64 count) {
  constexpr i64 kLine = 64 / i64{sizeof(Storage)};
  for (i64 i = 0; i < count; i += kLine) fetch_line(from + i);
}

// `count` values and zeros behind them, for a vector of `kLength` that the array does not fill.
template <int kLength, typename Storage>
struct Padded {
  alignas(64) Storage values[kLength] = {};

  Padded(const Storage* from, i64 count) {
    for (int part = kLength / 2, at = 0; part > 0; part /= 2)
      if (count & part) {
        __builtin_memcpy(values + at, from + at, static_cast<std::size_t>(part) * sizeof(Storage));
        at += part;
      }
  }
};

// Adds `rows` rows of kVectors vectors of channels, or of `some` channels fewer than a vector, and fetches those
// kAhead rows further on; `last` is whether the memory behind the last row may be anybody's. Inlined because a
// call takes as long as a dozen vectors.
template <typename Element, i64 kAhead, typename Term, int kVectors, bool kSome, typename Operands>
[[gnu::always_inline]] inline void add_rows(const Operands& operands, i64 channel, i64 some, auto rows, bool last,
                                            const Term& term, TileSums& sums) {
  decltype(term.at(0)) at[kVectors];
  Vec first[kVectors];
  Vec second[kVectors];
  for (int k = 0; k < kVectors; ++k) {
    at[k] = term.at(channel + k * kWidth);
    first[k] = load(sums.first + channel + k * kWidth);
    second[k] = load(sums.second + channel + k * kWidth);
  }
#pragma GCC unroll 4
  for (i64 r = 0; r < rows; ++r) {
    const typename Element::Storage* from[Term::kOperands];
    for (int o = 0; o < Term::kOperands; ++o) {
      from[o] = operands[o].data + r * operands[o].stride + channel;
      fetch(from[o] + kAhead * operands[o].stride, kVectors * kWidth);
    }
    for (int k = 0; k < kVectors; ++k) {
      HalfF value[Term::kOperands];
      for (int o = 0; o < Term::kOperands; ++o) {
        // Before the last row, what lies behind a row is memory of the next one.
        if (kSome && ((last && r + 1 == rows) || operands[o].stride < kWidth))
          value[o] = Element::load_half(Padded<kWidth, typename Element::Storage>(from[o], some).values);
        else
          value[o] = Element::load_half(from[o] + k * kWidth);
      }
      Term::add(at[k], value, first[k], second[k]);
    }
  }
  for (int k = 0; k < kVectors; ++k) {
    store(sums.first + channel + k * kWidth, first[k]);
    store(sums.second + channel + k * kWidth, second[k]);
  }
}

// Adds `rows` rows of `width` channels: kVectors vectors at a time, then half of them, ...
template <typename Element, i64 kAhead, typename Term, int kVectors, typename Operands>
[[gnu::always_inline]] inline void add_tile(const Operands& operands, i64 c, i64 width, auto rows, bool last,
                                            const Term& term, TileSums& sums) {
  constexpr i64 kChannels = kVectors * kWidth;
  for (; c + kChannels <= width; c += kChannels)
    add_rows<Element, kAhead, Term, kVectors, false>(operands, c, 0, rows, last, term, sums);
  if constexpr (kVectors > 1)
    add_tile<Element, kAhead, Term, kVectors / 2>(operands, c, width, rows, last, term, sums);
  else if (c < width)
    add_rows<Element, kAhead, Term, 1, true>(operands, c, width - c, rows, last, term, sums);
}

// The same for more channels than the registers hold sums of.
template <typename Element, typename Term, typename Operands>
void add_wide_tile(const Operands& all, i64 width, i64 rows, const Term& term, TileSums& sums) {
  Rows<typename Element::Storage> operands[Term::kOperands];
  for (int o = 0; o < Term::kOperands; ++o) operands[o] = all[o];
  i64 r = 0;
  for (; r + kRowsOfSums <= rows; r += kRowsOfSums) {
    add_tile<Element, kWideFetchAhead, Term, kVectorsOfSums>(
        operands, 0, width, std::integral_constant<i64, kRowsOfSums>{}, r + kRowsOfSums == rows, term, sums);
    for (auto& operand : operands) operand.data += kRowsOfSums * operand.stride;
  }
  if (r < rows)
    add_tile<Element, kWideFetchAhead, Term, kVectorsOfSums>(operands, 0, width, rows - r, /*last=*/true, term,
                                                             sums);
}

inline bool have_plain_rows(const ArrayView* views, int operands, const Shape& shape) {
  bool plain = true;
  for (int o = 0; o < operands; ++o) plain &= has_plain_rows(views[o], shape);
  return plain;
}

// At most kTileChannels channels, or kWideTile where rows are plain. Rows that do not lie side by side are packed,
// and with `change` (not null) all of them are, to be changed by change(packed, rows) before they are summed.
template <typename Element, typename Term, typename Change>
void sums_by_rows(const ArrayView* views, const Shape& shape, Range rows, Range channels, const Term& term,
                  const Change& change, TileSums& sums) {
  using Storage = typename Element::Storage;
  constexpr bool kChange = !std::is_same_v<Change, std::nullptr_t>;
  Block<Storage> packed[Term::kOperands];
  const bool plain = !kChange && have_plain_rows(views, Term::kOperands, shape);
  const i64 step = plain ? rows.size() : kBlockRows;
  for (i64 begin = rows.begin; begin < rows.end; begin += step) {
    const Range block{begin, min_of(begin + step, rows.end)};
    Rows<Storage> operands[Term::kOperands];
    for (int o = 0; o < Term::kOperands; ++o) {
      if (!kChange && has_plain_rows(views[o], shape)) {
        operands[o] = plain_rows<Element>(views[o], shape, block.begin, channels.begin);
      } else {
        pack<Element>(views[o], shape, block, channels, packed[o]);
        operands[o] = {packed[o].at[0], kTileChannels};
      }
    }
    if constexpr (kChange) change(packed, block.size());
    if (channels.size() > kTileChannels) {
      add_wide_tile<Element>(operands, channels.size(), block.size(), term, sums);
    } else {
      add_tile<Element, kFetchAhead, Term, Term::kVectorsAtOnce>(operands, 0, channels.size(), block.size(),
                                                                 /*last=*/true, term, sums);
    }
  }
}

}  // namespace
}  // namespace torch_bn::kernels
