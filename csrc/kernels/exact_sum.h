// Sums of doubles to twice their precision, for the mean of float64 data. Means of narrower types need none
// of it: their sums in double are exact to far below the type's own rounding.
//
// Contraction and reassociation are off in this library; both would destroy these identities.
#pragma once

#include "blocks.h"

namespace torch_bn::kernels {
namespace {

// hi + lo gains x, the rounding of hi kept in lo (Knuth, The Art of Computer Programming 2, 4.2.2, theorem B):
//
//   s = fl(hi + x)     b = fl(s - hi)     hi + x = s + ((hi - (s - b)) + (x - b)) exactly
template <typename Number>
inline void add_exactly(Number& hi, Number& lo, Number x) {
  const Number sum = hi + x;
  const Number kept = sum - hi;
  lo += (hi - (sum - kept)) + (x - kept);
  hi = sum;
}

// The upper half of a double's mantissa (Dekker 1971, section 4).
inline double upper_half(double x) {
  const double scaled = 134217729.0 * x;  // 2^27 + 1
  return scaled - (scaled - x);
}

// The mean of n numbers whose sum is hi + lo, from an approximation to it: mean + (hi + lo - n * mean) / n.
// The product is taken exactly (Dekker 1971, section 5), so an exact mean stays as it is. Sums beyond the
// range of double leave the approximation.
inline double refined_mean(double mean, double hi, double lo, double n) {
  const double product = mean * n;
  const double mean_upper = upper_half(mean);
  const double n_upper = upper_half(n);
  const double mean_lower = mean - mean_upper;
  const double n_lower = n - n_upper;
  const double rest =
      ((mean_upper * n_upper - product) + mean_upper * n_lower + mean_lower * n_upper) + mean_lower * n_lower;
  const double correction = (((hi - product) - rest) + lo) / n;
  return correction - correction == 0.0 ? mean + correction : mean;
}

}  // namespace
}  // namespace torch_bn::kernels
