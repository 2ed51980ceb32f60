// The element types as they are stored, and their conversions: to floats that are widened for sums, to float (or
// double, for float64) for what is done element by element. Each comes for one value and for a vector of them.
// kVanishes is the largest result that is stored as zero.
//
// The 16-bit conversions are integer arithmetic on purpose: the same source gives the same bits on a
// processor with and without conversion instructions. A result in 16 bits is the correctly rounded form of
// the float32 result, ties to even.
#pragma once

#include "vec.h"

namespace torch_bn::kernels {
namespace {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Kinds of numbers that the conversions are written for: scalars, a full vector of floats, half of one.
struct One {
  using F = float;
  using U = std::uint32_t;
  using I = std::int32_t;
  using H = std::uint16_t;
  template <typename To, typename From>
  static To convert(From from) {
    return static_cast<To>(from);
  }
};
struct Many {
  template <typename To, typename From>
  static To convert(From from) {
    return __builtin_convertvector(from, To);
  }
};
struct Full : Many {
  using F = VecF;
  using U = std::uint32_t __attribute__((vector_size(kFloats * 4)));
  using I = std::int32_t __attribute__((vector_size(kFloats * 4)));
  using H = std::uint16_t __attribute__((vector_size(kFloats * 2)));
};
struct Half : Many {
  using F = HalfF;
  using U = std::uint32_t __attribute__((vector_size(kWidth * 4)));
  using I = std::int32_t __attribute__((vector_size(kWidth * 4)));
  using H = std::uint16_t __attribute__((vector_size(kWidth * 2)));
};

struct Float32 {
  static constexpr bool kIsDouble = false;
  static constexpr float kVanishes = 0.0F;
  using Storage = float;
  using Real = float;
  using Vector = VecF;
  static float load(Storage x) { return x; }
  static Storage store(float x) { return x; }
  static VecF load_vector(const Storage* from) { return load_as<VecF>(from); }
  static void store_vector(Storage* to, VecF v) { kernels::store(to, v); }
  static void stream_vector(Storage* to, VecF v) { kernels::stream(to, v); }
  static HalfF load_half(const Storage* from) { return load_as<HalfF>(from); }
  static void store_half(Storage* to, HalfF v) { kernels::store(to, v); }
};

struct Float64 {
  static constexpr bool kIsDouble = true;
  static constexpr double kVanishes = 0.0;
  using Storage = double;
  using Real = double;
  using Vector = Vec;
  static double load(Storage x) { return x; }
  static Storage store(double x) { return x; }
  static Vec load_vector(const Storage* from) { return kernels::load(from); }
  static void store_vector(Storage* to, Vec v) { kernels::store(to, v); }
  static void stream_vector(Storage* to, Vec v) { kernels::stream(to, v); }
};

// A type of 16 bits, by its conversions to and from float.
template <typename Bits>
struct Reduced {
  static constexpr bool kIsDouble = false;
  static constexpr float kVanishes = Bits::kVanishes;
  using Storage = std::uint16_t;
  using Real = float;
  using Vector = VecF;
  static float load(Storage x) { return Bits::template to_float<One>(x); }
  static Storage store(float x) { return Bits::template from_float<One>(x); }
  static VecF load_vector(const Storage* from) {
    return Bits::template to_float<Full>(load_as<typename Full::H>(from));
  }
  static void store_vector(Storage* to, VecF v) { kernels::store(to, Bits::template from_float<Full>(v)); }
  static void stream_vector(Storage* to, VecF v) { kernels::stream(to, Bits::template from_float<Full>(v)); }
  static HalfF load_half(const Storage* from) {
    return Bits::template to_float<Half>(load_as<typename Half::H>(from));
  }
  static void store_half(Storage* to, HalfF v) { kernels::store(to, Bits::template from_float<Half>(v)); }
};

struct BFloat16Bits {
  static constexpr float kVanishes = 0x1p-134F;
  template <typename K>
  static typename K::F to_float(typename K::H x) {
    return bits_as<typename K::F>(K::template convert<typename K::U>(x) << 16);
  }
  template <typename K>
  static typename K::H from_float(typename K::F value) {
    const auto u = bits_as<typename K::U>(value);
    const typename K::U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const typename K::U quiet = (u & 0u) + 0x7fc0u;
    return K::template convert<typename K::H>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
  }
};

struct Float16Bits {
  static constexpr float kVanishes = 0x1p-25F;
  template <typename K>
  static typename K::F to_float(typename K::H h) {
    const auto bits = K::template convert<typename K::U>(h);
    const typename K::U magnitude = bits & 0x7fffu;
    // A subnormal is magnitude * 2^-24, computed from the integer, so that a flushing mode cannot lose it.
    const typename K::F small =
        K::template convert<typename K::F>(K::template convert<typename K::I>(magnitude)) * 0x1p-24F;
    const typename K::U special = (bits & 0u) + 0x70000000u;
    const typename K::U usual = (bits & 0u) + 0x38000000u;
    const typename K::U exponent = magnitude >= 0x7c00u ? special : usual;
    const typename K::U normal = (magnitude << 13) + exponent;
    const typename K::U absolute = magnitude < 0x0400u ? bits_as<typename K::U>(small) : normal;
    return bits_as<typename K::F>(absolute | ((bits & 0x8000u) << 16));
  }
  template <typename K>
  static typename K::H from_float(typename K::F value) {
    const auto u = bits_as<typename K::U>(value);
    const typename K::U sign = (u >> 16) & 0x8000u;
    const typename K::U magnitude = u & 0x7fffffffu;
    const typename K::U nan = (u & 0u) + 0x7e00u;
    const typename K::U infinity = (u & 0u) + 0x7c00u;
    // Below 2^-14 results are multiples of 2^-24. Adding 0.5 puts the last bit of the sum there: the addition
    // itself rounds to nearest even.
    const typename K::U small = bits_as<typename K::U>(bits_as<typename K::F>(magnitude) + 0.5F) - 0x3f000000u;
    const typename K::U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    typename K::U result = magnitude < 0x38800000u ? small : normal;
    // 65520, half way to the next power, rounds to infinity.
    result = magnitude >= 0x477ff000u ? infinity : result;
    result = magnitude > 0x7f800000u ? nan : result;
    return K::template convert<typename K::H>(sign | result);
  }
};

using BFloat16 = Reduced<BFloat16Bits>;
using Float16 = Reduced<Float16Bits>;

}  // namespace
}  // namespace torch_bn::kernels
