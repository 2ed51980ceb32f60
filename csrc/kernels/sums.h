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
// Of two operands that no cache holds, rows that follow one another are summed one at a time, so that each is read
// as it lies: in cache that costs more, because all sums are read and written with every row. A long row is
// fetched while the one before is summed, and then it pays in the last level, too, unless what a term knows of the
// channels is read with every row as well.
constexpr i64 kLongRow = 512;              // channels
constexpr i64 kInNoCache = i64{32} << 20;  // bytes of an operand
// Rows to fetch ahead where all sums are in registers; a few rows at a time fetch the next few.
constexpr i64 kFetchAhead = 16;
// Bytes of an operand from which on rows are fetched ahead: they lie too far apart for the processor to foresee
// the next. Smaller operands are in a cache as a rule, where fetching costs up to a tenth of the time, and of two
// operands the rows drive each other out, unless they are short: then it costs nothing, and pays in a network,
// where the input of a backward has been left long ago. What narrower vectors take of a row at a time is foreseen
// less well.
template <int kOperands>
constexpr i64 kFetchFrom = i64{kWidth} << (kOperands == 1 ? 18 : 20);

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
  for (i64 i = 0; i < count; i += 64 / static_cast<i64>(sizeof(Storage))) __builtin_prefetch(from + i);
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

// Adds `rows` rows of kVectors vectors of channels, or of `some` channels fewer than a vector. `ahead` is how many
// rows to fetch ahead, or none; `last` whether the memory behind the last row may be anybody's. Inlined because a
// call takes as long as a dozen vectors.
template <typename Element, typename Term, int kVectors, bool kSome, typename Operands>
[[gnu::always_inline]] inline void add_rows(const Operands& operands, i64 channel, i64 some, auto rows, auto ahead,
                                            bool last, const Term& term, TileSums& sums) {
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
      if (ahead > 0) fetch(from[o] + ahead * operands[o].stride, kVectors * kWidth);
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
template <typename Element, typename Term, int kVectors, typename Operands>
[[gnu::always_inline]] inline void add_tile(const Operands& operands, i64 c, i64 width, auto rows, auto ahead,
                                            bool last, const Term& term, TileSums& sums) {
  constexpr i64 kChannels = kVectors * kWidth;
  for (; c + kChannels <= width; c += kChannels)
    add_rows<Element, Term, kVectors, false>(operands, c, 0, rows, ahead, last, term, sums);
  if constexpr (kVectors > 1)
    add_tile<Element, Term, kVectors / 2>(operands, c, width, rows, ahead, last, term, sums);
  else if (c < width)
    add_rows<Element, Term, 1, true>(operands, c, width - c, rows, ahead, last, term, sums);
}

template <i64 kValue>
using Constant = std::integral_constant<i64, kValue>;

// The same for more channels than the registers hold sums of, kRows rows at a time.
template <typename Element, i64 kRows, typename Term, typename Operands>
void add_wide_tile(const Operands& all, i64 width, i64 rows, auto ahead, const Term& term, TileSums& sums) {
  Rows<typename Element::Storage> operands[Term::kOperands];
  for (int o = 0; o < Term::kOperands; ++o) operands[o] = all[o];
  i64 r = 0;
  for (; r + kRows <= rows; r += kRows) {
    add_tile<Element, Term, kVectorsOfSums>(operands, 0, width, Constant<kRows>{}, ahead, r + kRows == rows, term,
                                            sums);
    for (auto& operand : operands) operand.data += kRows * operand.stride;
  }
  if (kRows > 1 && r < rows)
    add_tile<Element, Term, kVectorsOfSums>(operands, 0, width, rows - r, ahead, true, term, sums);
}

// Chooses how many rows at a time, and what is fetched, by the bytes of an operand.
template <typename Element, typename Term, typename Operands>
void add_wide_tile(const Operands& operands, i64 width, i64 rows, i64 bytes, const Term& term, TileSums& sums) {
  bool far = bytes >= kFetchFrom<Term::kOperands>;
  if constexpr (Term::kOperands == 2) {
    const bool follow = operands[0].stride == width && operands[1].stride == width;
    const bool long_rows = width > kLongRow;
    constexpr bool kKnowsChannels = !std::is_same_v<decltype(term.at(0)), std::nullptr_t>;
    if (follow && (long_rows && !kKnowsChannels ? far : bytes >= kInNoCache)) {
      const i64 ahead = long_rows ? 1 : 0;
      add_wide_tile<Element, 1>(operands, width, rows, ahead, term, sums);
      return;
    }
    far = far || (operands[0].stride <= kLongRow && operands[1].stride <= kLongRow);
  }
  if (far)
    add_wide_tile<Element, kRowsOfSums>(operands, width, rows, Constant<kRowsOfSums>{}, term, sums);
  else
    add_wide_tile<Element, kRowsOfSums>(operands, width, rows, Constant<0>{}, term, sums);
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
  const i64 bytes = shape.n * shape.c * shape.l * static_cast<i64>(sizeof(Storage));
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
      add_wide_tile<Element>(operands, channels.size(), block.size(), bytes, term, sums);
    } else {
      const i64 ahead = bytes >= kFetchFrom<Term::kOperands> ? kFetchAhead : 0;
      add_tile<Element, Term, Term::kVectorsAtOnce>(operands, 0, channels.size(), block.size(), ahead,
                                                    /*last=*/true, term, sums);
    }
  }
}

}  // namespace
}  // namespace torch_bn::kernels
