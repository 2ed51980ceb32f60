// Vectors of doubles along the channels, as wide as the instruction set has them. The width changes how many
// channels go at a time, never the order of a sum.
#pragma once

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
using Vec = double __attribute__((vector_size(kWidth * sizeof(double))));
static_assert(kTileChannels % kWidth == 0);

inline Vec load(const double* from) {
  Vec v;
  __builtin_memcpy(&v, from, sizeof(Vec));
  return v;
}

inline void store(double* to, Vec v) {
  __builtin_memcpy(to, &v, sizeof(Vec));
}

// Sum over rows 0 .. rows-1 of term(row): lane j takes rows j, j + kLanes, ...; then a fixed tree.
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
