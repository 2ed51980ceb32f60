// Vectors, as wide as the instruction set has them. The width changes how many channels (or lanes) go at a
// time, never the order of a sum.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "blocks.h"

namespace torch_bn::kernels {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 8;
#elif defined(__AVX__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kFloats = 2 * kWidth;

using Vec = double __attribute__((vector_size(kWidth * sizeof(double))));
using VecF = float __attribute__((vector_size(kFloats * sizeof(float))));
using HalfF = float __attribute__((vector_size(kWidth * sizeof(float))));
static_assert(kTileChannels % kWidth == 0);

template <typename V>
inline V load_as(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof(V));
  return v;
}

inline Vec load(const double* from) {
  return load_as<Vec>(from);
}

template <typename T, typename V>
inline void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof(V));
}

template <typename V, typename Number>
inline V broadcast(Number value) {
  return value - V{};
}

// A store past the caches, to an address aligned to the vector; the end of such stores before others may read.
template <typename T, typename V>
inline void stream(T* to, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_as<__m512i>(&v));
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_as<__m256i>(&v));
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_as<__m128i>(&v));
#endif
  store(to, v);
}
inline void end_of_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

inline Vec widen(HalfF v) {
#if defined(__AVX512F__)  // compilers are known to convert in four pieces what is one instruction
  return _mm512_cvtps_pd(v);
#elif defined(__AVX__)
  return _mm256_cvtps_pd(v);
#else
  return __builtin_convertvector(v, Vec);
#endif
}

inline HalfF narrowed(Vec v) {
#if defined(__AVX512F__)
  return _mm512_cvtpd_ps(v);
#elif defined(__AVX__)
  return _mm256_cvtpd_ps(v);
#else
  return __builtin_convertvector(v, HalfF);
#endif
}

template <typename T>
inline T magnitude(T x) {
  return x < T{} ? -x : x;
}

inline double root(double x) {
  return __builtin_sqrt(x);
}
inline Vec root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_sqrt_pd(v);
#elif defined(__AVX__)
  return _mm256_sqrt_pd(v);
#else
  for (int i = 0; i < kWidth; ++i) v[i] = root(v[i]);
  return v;
#endif
}

// a * b + c for products that are exact in double. Then one rounding is the same as two, and it does not matter
// to the bits whether an instruction set has the fused operation.
inline Vec add_exact_product(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// Sum over rows 0 .. rows-1 of term(row): lane j takes rows j, j + kLanes, ...; then a fixed tree.
constexpr int kLanes = 8;
template <typename Term>
inline Vec sum_rows(i64 rows, Term term) {
  static_assert(kLanes == 8);
  Vec lane[kLanes] = {};
  i64 r = 0;
  for (; r + kLanes <= rows; r += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += term(r + j);
  for (int j = 0; j < kLanes; ++j)
    if (r + j < rows) lane[j] += term(r + j);
  return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
}

}  // namespace
}  // namespace torch_bn::kernels
