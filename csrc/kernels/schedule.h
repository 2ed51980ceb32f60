// How a call's work is shared out. It changes the speed, never a bit.
#pragma once

#include "lines.h"
#include "partials.h"

namespace torch_bn::kernels {
namespace {

// What a block of channels may take of a core's own cache, for its input to be there still in a second sweep.
constexpr i64 kOwnCache = i64{512} << 10;
// The same of the last level, for two operands that exceed it: blocks that are too narrow otherwise. Smaller ones
// stay there anyway, and with one operand the second sweep writes as much as a block would save.
constexpr i64 kSharedCache = i64{4} << 20;
constexpr i64 kBeyondShared = i64{32} << 20;
// Narrower pieces of rows than this are not worth a trip to memory of their own.
constexpr i64 kNarrowest = 256;
// Lines that lie a multiple of this apart fall into few of a cache's sets, and drive each other out.
constexpr i64 kAliasing = 4096;
// Shares and blocks of channels start at multiples of this many.
constexpr i64 kGrain = 16;

// Channels to sum at a time: at most `widest`, and so few that every thread gets tiles.
inline i64 tile_for(const Partition& partition, i64 channels, i64 widest, int threads) {
  i64 tile = widest;
  while (threads > 1 && tile > kTileChannels && partition.segments * ceil_div(channels, tile) < 2 * threads)
    tile /= 2;
  return tile;
}

// Either every thread takes channels of its own, a block of them from the first sum to the last result, and
// no thread waits for another; or the threads share the rows and meet between sweeps.
struct Schedule {
  bool by_channels;
  i64 block;  // channels of a block
  i64 tile;   // channels that are summed at a time

  Schedule(const Shape& shape, const Partition& partition, i64 bytes_per_element, i64 operands, i64 widest_tile,
           int threads)
      : tile(tile_for(partition, shape.c, widest_tile, threads)) {
    const i64 bytes_per_channel = partition.rows * bytes_per_element * operands;
    const i64 fitting = kOwnCache / bytes_per_channel;
    const i64 own = round_up(ceil_div(shape.c, threads), kGrain);
    const bool streams = bytes_per_channel * shape.c > 2 * kOwnCache * threads;
    if (partition.along_lines) {
      block = max_of(fitting, 1);
      // A block's lines lie far apart. Two sweeps in the order of memory cost less than that, but for a backward,
      // which would read two arrays twice, whose block's lines are long and find room.
      const bool aliases = shape.c * shape.l * bytes_per_element % kAliasing == 0;
      const bool two_sweeps = streams && (operands == 1 || aliases || shape.l < kShortLine);
      by_channels = (threads == 1 || shape.c >= 2 * kGrain * threads) && !two_sweeps;
    } else {
      const i64 narrowest = min_of(kNarrowest, shape.c);
      block = min_of(fitting / kGrain * kGrain, own);
      if (block < narrowest && operands == 2 && bytes_per_channel * shape.c >= kBeyondShared)
        block = min_of(kSharedCache / bytes_per_channel / kGrain * kGrain, own);
      const bool fits = block >= narrowest;
      // In cache, threads share the rows: half of every row of a power of two would fill half of the cache's sets.
      by_channels = fits && (threads == 1 || streams);
    }
    if (!by_channels) block = shape.c;
  }
};

// This thread's channels.
inline Range share_of_channels(const Team& team, i64 channels) {
  const Range grains = team.share(ceil_div(channels, kGrain));
  return {grains.begin * kGrain, min_of(grains.end * kGrain, channels)};
}

// Calls visit(block) for the blocks of a range of channels.
template <typename Visit>
void for_each_block(Range channels, i64 width, Visit visit) {
  for (i64 c = channels.begin; c < channels.end; c += width) visit(Range{c, min_of(c + width, channels.end)});
}

// Calls sum(segment, tile) for this thread's share of all segments and tiles.
template <typename Sum>
void share_segments(const Team& team, const Partition& partition, i64 channels, i64 tile, Sum sum) {
  const i64 tiles = ceil_div(channels, tile);
  const Range tasks = team.share(partition.segments * tiles);
  for (i64 task = tasks.begin; task < tasks.end; ++task) {
    const i64 c = task % tiles * tile;
    sum(task / tiles, Range{c, min_of(c + tile, channels)});
  }
}

// The frame of both directions, run by every thread of a team: sum(partials, segment, tile) where there is
// anything to sum, finish(partials, channels) from sums to coefficients, write(units, channels).
template <typename Sum, typename Finish, typename Write>
void run_phases(const Team& team, const Schedule& schedule, const Partition& partition, const Partials& partials,
                i64 channels, i64 units, bool has_sums, Sum sum, Finish finish, Write write) {
  const Range own = share_of_channels(team, channels);
  if (schedule.by_channels && has_sums) {
    for_each_block(own, schedule.block, [&](Range block) {
      const Partials some = partials.of_block(partition, own, block);
      for (i64 s = 0; s < partition.segments; ++s)
        for_each_block(block, schedule.tile, [&](Range tile) { sum(some, s, tile); });
      finish(some, block);
      write(Range{0, units}, block);
    });
    return;
  }
  if (has_sums) {
    share_segments(team, partition, channels, schedule.tile, [&](i64 s, Range tile) { sum(partials, s, tile); });
    team.barrier();
  }
  finish(partials, own);
  team.barrier();
  write(team.share(units), Range{0, channels});
}

}  // namespace
}  // namespace torch_bn::kernels
