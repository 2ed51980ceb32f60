// A slow batch norm in long double, straight from the definition, and the random data to try it on.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/api.h"

namespace torch_bn::testing {

using kernels::Shape;

inline std::size_t elements(const Shape& shape) {
  return static_cast<std::size_t>(shape.n * shape.c * shape.l);
}
inline std::size_t at(const Shape& shape, int64_t n, int64_t c, int64_t l) {
  return static_cast<std::size_t>((n * shape.c + c) * shape.l + l);
}

// Normal numbers around `mean`; a generator of our own seed each time, so that tests run in any order.
template <typename T>
std::vector<T> normal(std::size_t count, double mean, double std, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::normal_distribution<double> distribution(mean, std);
  std::vector<T> values(count);
  for (T& value : values) value = static_cast<T>(distribution(generator));
  return values;
}

struct Reference {
  std::vector<long double> mean, var, invstd, output, grad_input, grad_weight, grad_bias;
};

// Training batch norm and its gradients of contiguous (N, C, L) data.
template <typename T>
Reference reference(const Shape& shape, const std::vector<T>& x, const std::vector<T>& weight,
                    const std::vector<T>& bias, const std::vector<T>& g, double eps) {
  Reference result;
  result.output.resize(elements(shape));
  result.grad_input.resize(elements(shape));
  const auto rows = static_cast<long double>(shape.n * shape.l);
  for (int64_t c = 0; c < shape.c; ++c) {
    auto sum = [&](auto term) {
      long double total = 0;
      for (int64_t n = 0; n < shape.n; ++n)
        for (int64_t l = 0; l < shape.l; ++l) total += term(at(shape, n, c, l));
      return total;
    };
    const long double mean = sum([&](std::size_t i) -> long double { return x[i]; }) / rows;
    const long double var = sum([&](std::size_t i) { return (x[i] - mean) * (x[i] - mean); }) / rows;
    const long double invstd = 1 / std::sqrt(var + static_cast<long double>(eps));
    const long double total = sum([&](std::size_t i) -> long double { return g[i]; });
    const long double dot = sum([&](std::size_t i) { return g[i] * (x[i] - mean) * invstd; });
    for (int64_t n = 0; n < shape.n; ++n)
      for (int64_t l = 0; l < shape.l; ++l) {
        const std::size_t i = at(shape, n, c, l);
        const long double xhat = (x[i] - mean) * invstd;
        result.output[i] = xhat * weight[c] + bias[c];
        result.grad_input[i] = (g[i] - total / rows - xhat * dot / rows) * invstd * weight[c];
      }
    result.mean.push_back(mean);
    result.var.push_back(var);
    result.invstd.push_back(invstd);
    result.grad_weight.push_back(dot);
    result.grad_bias.push_back(total);
  }
  return result;
}

// max |a - b| / max |b|
template <typename A>
double error(const std::vector<A>& a, const std::vector<long double>& b) {
  long double worst = 0;
  long double scale = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    const long double distance = std::fabs(static_cast<long double>(a[i]) - b[i]);
    if (!(distance <= worst)) worst = distance;  // a NaN stays
    scale = std::fmax(scale, std::fabs(b[i]));
  }
  return static_cast<double>(worst / scale);
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace torch_bn::testing
