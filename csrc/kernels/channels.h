// Reading and writing the per-channel arguments, which come in the parameters' own type and stride.
#pragma once

#include "element.h"

namespace torch_bn::kernels {
namespace {

template <typename Element>
double read_channel(const ChannelView& view, i64 c, double otherwise) {
  if (view.data == nullptr) return otherwise;
  return Element::load(static_cast<const typename Element::Storage*>(view.data)[c * view.stride]);
}

// The values of some channels to out[channel - first].
template <typename Element>
void read_channels(const ChannelView& view, Range channels, double otherwise, double* out, i64 first = 0) {
  if (view.data != nullptr && view.stride == 1) {
    const auto* from = static_cast<const typename Element::Storage*>(view.data);
    for (i64 c = channels.begin; c < channels.end; ++c) out[c - first] = Element::load(from[c]);
  } else {
    for (i64 c = channels.begin; c < channels.end; ++c) out[c - first] = read_channel<Element>(view, c, otherwise);
  }
}

template <typename Element>
void write_channel(void* data, i64 index, double value) {
  static_cast<typename Element::Storage*>(data)[index] =
      Element::store(static_cast<typename Element::Real>(value));
}

// A channel is plain if arithmetic in float32 on its elements cannot leave float32's range, nor lose more
// than the usual roundings, before the result itself does. A factor has to be zero or within [2^-100, 2^100],
// what is added or subtracted at most 2^100: a difference then overflows only if the result does, and a
// product of the smallest factor is rounded no more coarsely than the result. NaN is not plain.
constexpr double kLargest = 0x1p100;
constexpr double kSmallest = 0x1p-100;

inline bool plain_factor(double x) {
  return x == 0.0 || (__builtin_fabs(x) >= kSmallest && __builtin_fabs(x) <= kLargest);
}
inline bool plain_term(double x) {
  return __builtin_fabs(x) <= kLargest;
}

}  // namespace
}  // namespace torch_bn::kernels
