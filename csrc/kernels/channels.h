// What is done once a channel, in double. A function of a channel is written once, for one (V is double) and for a
// vector of them (V is Vec); arguments and results come in the parameters' own type.
#pragma once

#include <type_traits>

#include "element.h"

namespace torch_bn::kernels {
namespace {

// Calls visit<V>(c) for some channels, a vector at a time. Those of the last vector which the one before it had
// come twice: no value may be read that a visit has written.
template <typename Visit>
void for_channels(Range channels, Visit visit) {
  const i64 last = channels.end - kWidth;
  if (last < channels.begin) {
    for (i64 c = channels.begin; c < channels.end; ++c) visit.template operator()<double>(c);
    return;
  }
  for (i64 c = channels.begin; c < last; c += kWidth) visit.template operator()<Vec>(c);
  visit.template operator()<Vec>(last);
}

// The same for values that replace those they come from: put(c, compute<V>(c)).
template <typename Compute, typename Put>
void update_channels(Range channels, Compute compute, Put put) {
  const i64 last = channels.end - kWidth;
  if (last < channels.begin) {
    for (i64 c = channels.begin; c < channels.end; ++c) put(c, compute.template operator()<double>(c));
    return;
  }
  const Vec of_last = compute.template operator()<Vec>(last);
  for (i64 c = channels.begin; c < last; c += kWidth) put(c, compute.template operator()<Vec>(c));
  put(last, of_last);
}

template <typename Element, typename V>
V load_channels(const typename Element::Storage* from) {
  if constexpr (std::is_same_v<V, double>)
    return Element::load(*from);
  else if constexpr (Element::kIsDouble)
    return load(from);
  else
    return widen(Element::load_half(from));
}

template <typename Element, typename V>
void store_channels(typename Element::Storage* to, V values) {
  if constexpr (std::is_same_v<V, double>)
    *to = Element::store(static_cast<typename Element::Real>(values));
  else if constexpr (Element::kIsDouble)
    store(to, values);
  else
    Element::store_half(to, narrowed(values));
}

// From channel c on, or `otherwise` where there is no array.
template <typename Element, typename V>
V read_channels(const ChannelView& view, i64 c, double otherwise) {
  if (view.data == nullptr) return broadcast<V>(otherwise);
  const auto* from = static_cast<const typename Element::Storage*>(view.data) + c * view.stride;
  if constexpr (!std::is_same_v<V, double>) {
    if (view.stride != 1) {
      V values;
      for (int i = 0; i < kWidth; ++i) values[i] = Element::load(from[i * view.stride]);
      return values;
    }
  }
  return load_channels<Element, V>(from);
}

// A channel is plain if arithmetic in float32 on its elements cannot leave float32's range, nor lose more
// than the usual roundings, before the result itself does. A factor has to be zero or within [2^-100, 2^100],
// what is added or subtracted at most 2^100: a difference then overflows only if the result does, and a
// product of the smallest factor is rounded no more coarsely than the result. NaN is not plain.
constexpr double kLargest = 0x1p100;
constexpr double kSmallest = 0x1p-100;

template <typename V>
auto plain_factor(V x) {
  const V size = magnitude(x);
  return (x == V{}) | ((size >= broadcast<V>(kSmallest)) & (size <= broadcast<V>(kLargest)));
}
template <typename V>
auto plain_term(V x) {
  return magnitude(x) <= broadcast<V>(kLargest);
}

// Bytes that are zero where a condition does not hold; returns whether all of them do.
inline bool store_flags(std::uint8_t* to, bool flag) {
  *to = flag ? 1 : 0;
  return flag;
}
inline bool store_flags(std::uint8_t* to, decltype(Vec{} < Vec{}) mask) {
  using Bytes = std::uint8_t __attribute__((vector_size(kWidth)));
  const Bytes flags = __builtin_convertvector(mask, Bytes);
  const Bytes all = ~Bytes{};
  store(to, flags);
  return __builtin_memcmp(&flags, &all, sizeof(Bytes)) == 0;
}

// Marks the plain channels, of float64 data all; returns whether nobody reads their coefficients in double.
template <typename Element, typename Mask>
bool store_plain(std::uint8_t* to, Mask plain) {
  if constexpr (Element::kIsDouble) plain |= ~plain;
  return store_flags(to, plain) && !Element::kIsDouble;
}

}  // namespace
}  // namespace torch_bn::kernels
