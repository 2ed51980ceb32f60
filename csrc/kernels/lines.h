// The two sums of sums.h along lines (n, c, :). Short ones of a tile of channels go in the order of memory,
// because those of one channel lie too far apart for the processor to foresee the next; long ones go channel by
// channel.
//
// Value i of a line, or of a piece of a long one, goes to lane i mod kShortLanes or kLongLanes. The lanes of a
// short line are added to the channel's half as many at its end, those of long lines are kept until all are in.
// Lanes are added in a fixed tree: the upper half to the lower one until one is left.
#pragma once

#include "sums.h"

namespace torch_bn::kernels {
namespace {

// Of short lines few, which are soon added up; of long ones so many that no sum waits for the last.
constexpr int kShortLanes = 16;
constexpr int kLongLanes = 32;
constexpr int kChannelLanes = kShortLanes / 2;
constexpr i64 kShortLine = 512;
static_assert(kShortLine <= kPiece);
// Channels of short lines whose lanes stay in the first-level cache.
constexpr i64 kLineTile = 256;
// Short lines are fetched so many values ahead: the processor does not foresee the next page.
constexpr i64 kValuesAhead = 1024;

// How many channels may be summed at a time.
template <typename Element>
i64 widest_tile(const ArrayView* views, int operands, const Shape& shape, const Partition& partition) {
  if (Element::kIsDouble) return kTileChannels;
  if (partition.along_lines) return shape.l < kShortLine ? kLineTile : kTileChannels;
  return have_plain_rows(views, operands, shape) ? kWideTile : kTileChannels;
}

// Vectors first: of an array the compiler makes a loop.
inline double sum_of_lanes(const double* lane) {
  static_assert(kChannelLanes == 8);
  using Four = double __attribute__((vector_size(4 * sizeof(double))));
  using Two = double __attribute__((vector_size(2 * sizeof(double))));
  double half[4];
  store(half, load_as<Four>(lane) + load_as<Four>(lane + 4));
  store(half, load_as<Two>(half) + load_as<Two>(half + 2));
  return half[0] + half[1];
}

// Both sums of the short lines of a tile's channels, lane by lane.
struct alignas(64) ChannelLanes {
  double first[kLineTile][kChannelLanes];
  double second[kLineTile][kChannelLanes];

  explicit ChannelLanes(i64 channels) {
    for (i64 c = 0; c < channels; ++c)
      for (int lane = 0; lane < kChannelLanes; ++lane) first[c][lane] = second[c][lane] = 0.0;
  }
};

// Where an operand ends in memory, or null where its lines do not lie upwards.
template <typename Element>
const typename Element::Storage* end_of(const ArrayView& view, const Shape& shape) {
  if (view.stride_n < 0 || view.stride_c < 0) return nullptr;
  return element_at<Element>(view, shape.n - 1, shape.c - 1, shape.l - 1) + 1;
}

// Lanes of both sums, in registers.
template <int kLanes>
struct LineLanes {
  static constexpr int kVectors = kLanes / kWidth;
  Vec first[kVectors] = {};
  Vec second[kVectors] = {};

  // Adds as many as a channel has to `channel`. Works on a copy, so that the lanes themselves stay in registers.
  [[gnu::always_inline]] static void add_to(double* channel, const Vec* lanes) {
    Vec sum[kVectors];
#pragma GCC unroll 16
    for (int k = 0; k < kVectors; ++k) sum[k] = lanes[k];
    for (int count = kVectors / 2; count >= kChannelLanes / kWidth; count /= 2)
      for (int k = 0; k < count; ++k) sum[k] += sum[k + count];
    for (int k = 0; k < kChannelLanes / kWidth; ++k)
      store(channel + k * kWidth, load(channel + k * kWidth) + sum[k]);
  }
  [[gnu::always_inline]] static double total(const Vec* lanes) {
    alignas(64) double channel[kChannelLanes] = {};
    add_to(channel, lanes);
    return sum_of_lanes(channel);
  }
};

// Adds a piece of a line, of operands that may be read up to where `room` values follow. Inlined for the lanes to
// stay in registers.
template <typename Element, int kLanes, typename Term>
[[gnu::always_inline]] inline void add_line(const typename Element::Storage* const* from, const i64* room,
                                            i64 length, const Term& term, i64 channel, LineLanes<kLanes>& lanes) {
  using Storage = typename Element::Storage;
  const auto along = term.along(channel);
  const auto add_lanes = [&](const Storage* const* at, const auto& changed) {
#pragma GCC unroll 16
    for (int k = 0; k < LineLanes<kLanes>::kVectors; ++k) {
      HalfF value[Term::kOperands];
      for (int o = 0; o < Term::kOperands; ++o) value[o] = changed(Element::load_half(at[o] + k * kWidth), k, o);
      Term::add(along, value, lanes.first[k], lanes.second[k]);
    }
  };
  const Storage* at[Term::kOperands];
  for (int o = 0; o < Term::kOperands; ++o) at[o] = from[o];
  const i64 rest = length % kLanes;
  for (i64 i = rest; i < length; i += kLanes) {
    add_lanes(at, [](HalfF v, int, int) { return v; });
    for (int o = 0; o < Term::kOperands; ++o) at[o] += kLanes;
  }
  if (rest > 0) {
    // Lanes behind the end take values whose terms are zero.
    using HalfI = std::int32_t __attribute__((vector_size(kWidth * sizeof(std::int32_t))));
    HalfI lane;
    for (int j = 0; j < kWidth; ++j) lane[j] = j;
    const int count = static_cast<int>(rest);
    const HalfF neutral[] = {broadcast<HalfF>(term.neutral(channel)), HalfF{}};
    Storage copy[Term::kOperands][kLanes] = {};
    for (int o = 0; o < Term::kOperands; ++o) {
      if (room[o] >= length - rest + kLanes) continue;
      __builtin_memcpy(copy[o], at[o], static_cast<std::size_t>(rest) * sizeof(Storage));
      at[o] = copy[o];
    }
    add_lanes(at, [&](HalfF v, int k, int o) { return lane < count - k * kWidth ? v : neutral[o]; });
  }
}

// The operands of lines, packed where their values do not lie side by side.
template <typename Element, int kOperands>
class Lines {
  using Storage = typename Element::Storage;

 public:
  Lines(const ArrayView* views, const Shape& shape) : views_(views), fetches_(shape.l < kShortLine) {
    for (int o = 0; o < kOperands; ++o) end_[o] = end_of<Element>(views[o], shape);
  }

  // Adds `length` values of the line (n, c, :) from `begin` on; the term counts channels from its own first.
  template <int kLanes, typename Term>
  [[gnu::always_inline]] void add(i64 n, i64 c, i64 begin, i64 length, const Term& term, i64 own,
                                  LineLanes<kLanes>& lanes) {
    const Storage* from[kOperands];
    i64 room[kOperands];
    for (int o = 0; o < kOperands; ++o) {
      const i64 stride = views_[o].stride_l;
      from[o] = element_at<Element>(views_[o], n, c, begin);
      room[o] = end_[o] != nullptr ? end_[o] - from[o] : 0;
      if (stride == 1) {
        if (fetches_) fetch(from[o] + kValuesAhead, length);
      } else {
        for (i64 i = 0; i < length; ++i) packed_[o][i] = from[o][i * stride];
        from[o] = packed_[o];
        room[o] = kPiece;
      }
    }
    add_line<Element>(from, room, length, term, own, lanes);
  }

 private:
  const ArrayView* views_;
  bool fetches_;
  const Storage* end_[kOperands];
  alignas(64) Storage packed_[kOperands][kPiece];
};

struct ChannelSums {
  double first;
  double second;
};

// Sums of one channel's long lines.
template <typename Element, typename Term>
[[gnu::always_inline]] inline ChannelSums sums_by_long_lines(Lines<Element, Term::kOperands>& lines,
                                                             const Partition& partition, Range items, i64 channel,
                                                             const Term& term, i64 own) {
  LineLanes<kLongLanes> lanes;
  i64 n = items.begin / partition.pieces;
  i64 begin = items.begin % partition.pieces * kPiece;
  for (i64 item = items.begin; item < items.end; ++item) {
    lines.add(n, channel, begin, min_of(partition.l - begin, kPiece), term, own, lanes);
    begin += kPiece;
    if (begin >= partition.l) {
      begin = 0;
      ++n;
    }
  }
  return {lanes.total(lanes.first), lanes.total(lanes.second)};
}

// Sums of a tile's channels, but for those that are left out: their sums mean nothing.
template <typename Element, typename Term, typename LeftOut>
void sums_by_lines(const ArrayView* views, const Shape& shape, const Partition& partition, Range items,
                   Range channels, const Term& term, const LeftOut& left_out, TileSums& sums) {
  Lines<Element, Term::kOperands> lines(views, shape);
  if (shape.l >= kShortLine) {
    for (i64 c = 0; c < channels.size(); ++c) {
      if (left_out(c)) continue;
      const auto [first, second] =
          sums_by_long_lines<Element>(lines, partition, items, channels.begin + c, term, c);
      sums.first[c] = first;
      sums.second[c] = second;
    }
    return;
  }
  ChannelLanes all(channels.size());
  for (i64 n = items.begin; n < items.end; ++n)  // a short line is one piece
    for (i64 c = 0; c < channels.size(); ++c) {
      if (left_out(c)) continue;
      LineLanes<kShortLanes> lanes;
      lines.add(n, channels.begin + c, 0, shape.l, term, c, lanes);
      lanes.add_to(all.first[c], lanes.first);
      lanes.add_to(all.second[c], lanes.second);
    }
  for (i64 c = 0; c < channels.size(); ++c) {
    sums.first[c] = sum_of_lanes(all.first[c]);
    sums.second[c] = sum_of_lanes(all.second[c]);
  }
}

template <typename Element, typename Term>
void sums_by_lines(const ArrayView* views, const Shape& shape, const Partition& partition, Range items,
                   Range channels, const Term& term, TileSums& sums) {
  sums_by_lines<Element>(
      views, shape, partition, items, channels, term, [](i64 /*channel*/) { return false; }, sums);
}

}  // namespace
}  // namespace torch_bn::kernels
