// Conversions between the stored element types and the double of the arithmetic.
//
// The 16-bit conversions are integer arithmetic on purpose: the same source gives the same bits on a
// processor with and without conversion instructions, and compilers vectorise it. A result in 16 bits is the
// correctly rounded form of the float32 result, ties to even.
#pragma once

#include "blocks.h"

namespace torch_bn::kernels {
namespace {

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

struct Float32 {
  static constexpr bool kIsDouble = false;
  using Storage = float;
  static double load(Storage x) { return x; }
  static Storage store(double x) { return static_cast<float>(x); }
};

struct Float64 {
  static constexpr bool kIsDouble = true;
  using Storage = double;
  static double load(Storage x) { return x; }
  static Storage store(double x) { return x; }
};

struct BFloat16 {
  static constexpr bool kIsDouble = false;
  using Storage = std::uint16_t;
  static double load(Storage x) { return bits_as<float>(static_cast<std::uint32_t>(x) << 16); }
  static Storage store(double value) {
    const auto u = bits_as<std::uint32_t>(static_cast<float>(value));
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
    return static_cast<Storage>(is_nan ? 0x7fc0u : rounded);
  }
};

struct Float16 {
  static constexpr bool kIsDouble = false;
  using Storage = std::uint16_t;
  static double load(Storage h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7fffu;
    // A subnormal is magnitude * 2^-24, computed from the integer, so that a flushing mode cannot lose it.
    const double small = static_cast<double>(magnitude) * 0x1p-24;
    const std::uint32_t exponent = magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u;
    const double normal = bits_as<float>((magnitude << 13) + exponent);
    const double absolute = magnitude < 0x0400u ? small : normal;
    return sign ? -absolute : absolute;
  }
  static Storage store(double value) {
    const auto u = bits_as<std::uint32_t>(static_cast<float>(value));
    const std::uint32_t sign = (u >> 16) & 0x8000u;
    const std::uint32_t magnitude = u & 0x7fffffffu;
    std::uint32_t result;
    if (magnitude > 0x7f800000u) {
      result = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520, half way to the next power, rounds to infinity
      result = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: multiples of 2^-24
      // Adding 0.5 puts the last bit of the sum at 2^-24: the addition itself rounds to nearest even.
      const float sum = bits_as<float>(magnitude) + 0.5f;
      result = bits_as<std::uint32_t>(sum) - 0x3f000000u;
    } else {
      result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return static_cast<Storage>(sign | result);
  }
};

}  // namespace
}  // namespace torch_bn::kernels
