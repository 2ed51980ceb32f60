// The ReLU beside a batch norm. It is torch's: NaN and zeros of both signs pass the forward unchanged; the
// gradient passes where the result is neither zero nor negative.
#pragma once

#include <type_traits>

#include "channels.h"
#include "tile.h"

namespace torch_bn::kernels {
namespace {

template <typename T>
inline T rectified(T x) {
  // One instruction in place of two, which takes its second operand where that is NaN or both are zeros.
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, VecF>) return static_cast<T>(_mm512_max_ps(_mm512_setzero_ps(), x));
  if constexpr (std::is_same_v<T, HalfF>) return static_cast<T>(_mm256_max_ps(_mm256_setzero_ps(), x));
#elif defined(__AVX__)
  if constexpr (std::is_same_v<T, VecF>) return static_cast<T>(_mm256_max_ps(_mm256_setzero_ps(), x));
  if constexpr (std::is_same_v<T, HalfF>) return static_cast<T>(_mm_max_ps(_mm_setzero_ps(), x));
#endif
  return x < T{} ? T{} : x;
}

inline void rectify(Block<double>& tile, i64 rows, i64 width) {
  for (i64 r = 0; r < rows; ++r)
    for (i64 c = 0; c < width; c += kWidth) store(&tile.at[r][c], rectified(load(&tile.at[r][c])));
}

// What is normalised.
template <Relu kRelu, typename T>
inline T before_norm(T x) {
  if constexpr (kRelu == Relu::before) x = rectified(x);
  return x;
}

// Keeps a vector's load apart from what a comparison selects of it. A masked load waits for the comparison, and
// then many of them wait for memory one after the other.
template <typename T>
inline T apart(T x) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, VecF>) asm("" : "+v"(x));
#endif
  return x;
}

// The gradient that comes through a ReLU which was given x, as stored.
template <typename T>
inline T passed(T g, T x) {
  return x <= T{} ? T{} : apart(g);
}

// ---------------------------------------------------------------------------------------------------------
// What normalises a channel (see forward.h), in double and in the form for float32:
//
//   y = (x - mean) * scale + bias      y = (x - high) * narrow_scale + narrow_bias
//
// The backward of a ReLU that comes after computes y again by the instructions of the forward, so that it finds
// the same sign for every element.
// ---------------------------------------------------------------------------------------------------------
struct Coefficients {
  double* mean;
  double* scale;
  double* bias;
  float* high;
  float* narrow_scale;
  float* narrow_bias;
  std::uint8_t* plain;  // whether the forward took the form for float32

  // The rest of the arrays, for a mean that lies elsewhere.
  static Coefficients take(Arrays& arrays, double* mean, i64 channels) {
    Coefficients of;
    of.mean = mean;
    of.scale = arrays.take<double>(channels);
    of.bias = arrays.take<double>(channels);
    of.high = arrays.take<float>(channels);
    of.narrow_scale = arrays.take<float>(channels);
    of.narrow_bias = arrays.take<float>(channels);
    of.plain = arrays.take<std::uint8_t>(channels);
    return of;
  }

  template <typename V>
  void set_wide(i64 c, V own_scale, V own_bias) const {
    store(scale + c, own_scale);
    store(bias + c, own_bias);
  }
  // Returns the high part of the mean.
  template <typename V>
  V set_narrow(i64 c, V own_mean, V own_scale) const {
    store_channels<Float32>(high + c, own_mean);
    store_channels<Float32>(narrow_scale + c, own_scale);
    return load_channels<Float32, V>(high + c);
  }
  // Sets what a channel needs, but for the mean, from c on; returns where what the form for float32 takes is
  // plain.
  template <typename Element, typename V>
  auto set(i64 c, V own_mean, V own_scale, V own_bias) const {
    const V low = own_mean - set_narrow(c, own_mean, own_scale);
    const V rest = own_bias - low * own_scale;
    store_channels<Float32>(narrow_bias + c, rest);
    const auto is_plain = plain_factor(own_scale) & plain_term(own_mean) & plain_term(rest);
    if (!store_plain<Element>(plain + c, is_plain)) set_wide(c, own_scale, own_bias);
    return is_plain;
  }
};

// The operand of the ReLU in one channel, or in a vector of them, in the precision of T.
template <typename Element, typename T>
struct PreActivation {
  T mean, scale, bias;

  // The gradient that comes through the ReLU behind the normalised x. A result so small that the element's type
  // holds it as zero counts as zero.
  T passed(T g, T x) const { return passed(g, x, x - mean, scale); }
  // The same with x - mean and the scale at hand, so that neither takes registers twice.
  T passed(T g, T /*x*/, T centred, T own_scale) const {
    const T y = centred * own_scale + bias;
    return y <= broadcast<T>(Element::kVanishes) ? T{} : apart(g);
  }
};

// The same for one element in double, whatever the forward did.
template <typename Element>
struct AnyPreActivation {
  PreActivation<Element, double> wide;
  PreActivation<Element, float> narrow;
  bool plain;

  double passed(double g, double x, double /*centred*/, double /*own_scale*/) const { return passed(g, x); }
  double passed(double g, double x) const {
    if (plain) return narrow.passed(1.0F, static_cast<float>(x)) == 0.0F ? 0.0 : g;
    const double y = (x - wide.mean) * wide.scale + wide.bias;
    return static_cast<float>(y) <= Element::kVanishes ? 0.0 : g;
  }
};

template <typename Element, typename T>
auto pre_activation(const Coefficients& of, i64 c) {
  if constexpr (Element::kIsDouble) {
    return PreActivation<Element, T>{load_as<T>(of.mean + c), load_as<T>(of.scale + c), load_as<T>(of.bias + c)};
  } else if constexpr (std::is_same_v<T, double>) {
    return AnyPreActivation<Element>{{of.mean[c], of.scale[c], of.bias[c]},
                                     {of.high[c], of.narrow_scale[c], of.narrow_bias[c]},
                                     of.plain[c] != 0};
  } else {
    return PreActivation<Element, T>{load_as<T>(of.high + c), load_as<T>(of.narrow_scale + c),
                                     load_as<T>(of.narrow_bias + c)};
  }
}

template <typename Element, typename V>
auto pre_activation_along(const Coefficients& of, i64 c) {
  if constexpr (Element::kIsDouble)
    return PreActivation<Element, V>{broadcast<V>(of.mean[c]), broadcast<V>(of.scale[c]),
                                     broadcast<V>(of.bias[c])};
  else
    return PreActivation<Element, V>{broadcast<V>(of.high[c]), broadcast<V>(of.narrow_scale[c]),
                                     broadcast<V>(of.narrow_bias[c])};
}

// Only where a ReLU comes after.
template <Relu kRelu, typename Element, typename T>
auto pre_activation_of(const Coefficients& of, i64 c) {
  if constexpr (kRelu == Relu::after)
    return pre_activation<Element, T>(of, c);
  else
    return nullptr;
}
template <Relu kRelu, typename Element, typename V>
auto pre_activation_of_line(const Coefficients& of, i64 c) {
  if constexpr (kRelu == Relu::after)
    return pre_activation_along<Element, V>(of, c);
  else
    return nullptr;
}

}  // namespace
}  // namespace torch_bn::kernels
