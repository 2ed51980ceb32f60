// Where the segments' partial results lie until they are merged.
#pragma once

#include "team.h"

namespace torch_bn::kernels {
namespace {

// A segment's partial results are a few arrays over the channels. Those of the first segment stand at the front of
// scratch, where the merged ones are left. The others' are dead before the result is written: they lie in the
// result's own memory where that is free until then, so that a call touches no more memory than it returns.
class Partials {
 public:
  Partials(double* first, double* rest, i64 arrays, i64 channels)
      : first_(first), rest_(rest), arrays_(arrays), channels_(channels), width_(channels) {}

  // For a thread that takes its channels block after block: every block in the place of the one before.
  Partials of_block(const Partition& partition, Range own, Range block) const {
    Partials some = *this;
    some.rest_ += (partition.segments - 1) * arrays_ * own.begin;
    some.width_ = block.size();
    some.begin_ = block.begin;
    return some;
  }

  // One of a segment's arrays, to be indexed by the channel.
  double* array(i64 segment, i64 which) const {
    if (segment == 0) return first_ + which * channels_;
    return rest_ + ((segment - 1) * arrays_ + which) * width_ - begin_;
  }

 private:
  double* first_;
  double* rest_;
  i64 arrays_;
  i64 channels_;
  i64 width_;
  i64 begin_ = 0;
};

// A result as room for the partial results of all segments but the first, or null where doubles cannot lie there.
// It is always large enough: all segments but the last have so many values a channel at least, of two bytes or
// more.
inline double* spare_room(void* result) {
  static_assert(min_of(kMinSegmentRows, kMinSegmentOfLines) * 2 >= kForwardPartials * i64{sizeof(double)});
  static_assert(kForwardPartials >= kBackwardPartials);
  const bool aligned = reinterpret_cast<std::uintptr_t>(result) % alignof(double) == 0;
  return aligned ? static_cast<double*>(result) : nullptr;
}

}  // namespace
}  // namespace torch_bn::kernels
