// One call of the kernels with any shape, strides, types and flags, and whether two calls gave the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "kernels/blocks.h"
#include "kernels/dispatch.h"

namespace torch_bn::fuzz {

using namespace torch_bn::kernels;

inline std::size_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Ordinary numbers, between 1/8 and 8 in size, of any sign and mantissa.
inline void fill_with_numbers(std::vector<std::uint8_t>& memory, DType dtype, std::uint64_t seed) {
  const std::size_t step = size_of(dtype);
  for (std::size_t i = 0; i + step <= memory.size(); i += step) {
    seed = seed * 6364136223846793005U + 1442695040888963407U;
    const std::uint64_t exponent = (seed >> 33) % 6;
    const std::uint64_t sign = seed >> 63 << 63;
    std::uint64_t bits = sign | (1020 + exponent) << 52 | (seed & 0xfffffffffffffU);
    if (dtype == DType::f32 || dtype == DType::bf16)
      bits = (sign >> 32 | (124 + exponent) << 23 | (seed >> 20 & 0x7fffffU)) >> (dtype == DType::bf16 ? 16 : 0);
    if (dtype == DType::f16) bits = sign >> 48 | (12 + exponent) << 10 | (seed >> 20 & 0x3ffU);
    std::memcpy(&memory[i], &bits, step);  // the low bytes of a little-endian number
  }
}

// An array in memory of exactly the size that its strides span.
struct Array {
  std::vector<std::uint8_t> memory;
  std::int64_t strides[3];
  std::int64_t origin = 0;  // of element (0, 0, 0), in elements
  std::size_t element;

  Array(const Shape& shape, DType dtype, const std::int64_t (&wanted)[3]) : element(size_of(dtype)) {
    const std::int64_t sizes[3] = {shape.n, shape.c, shape.l};
    std::int64_t last = 0;
    for (int d = 0; d < 3; ++d) {
      strides[d] = wanted[d];
      const std::int64_t span = (sizes[d] - 1) * strides[d];
      (span < 0 ? origin : last) += std::abs(span);
    }
    memory.resize(static_cast<std::size_t>(origin + last + 1) * element);
  }

  std::uint8_t* at(std::int64_t n, std::int64_t c, std::int64_t l) {
    return memory.data() +
           static_cast<std::size_t>(origin + n * strides[0] + c * strides[1] + l * strides[2]) * element;
  }
  ArrayView view() { return view_from(0); }
  ArrayView view_from(std::int64_t n) { return {at(n, 0, 0), strides[0], strides[1], strides[2]}; }
};

inline Array contiguous(const Shape& shape, DType dtype) {
  return {shape, dtype, {shape.c * shape.l, shape.l, 1}};
}

// Dense, with the dimensions in the order that decides how the sums of `input` run.
inline Array dense_like(const Array& input, const Shape& shape, DType dtype) {
  const bool channels_last =
      shape.l >= kMinLine && shape.c > 1 && std::abs(input.strides[2]) > std::abs(input.strides[1]);
  if (channels_last) return {shape, dtype, {shape.c * shape.l, 1, shape.c}};
  return contiguous(shape, dtype);
}

// Dense in some order of the dimensions, then perhaps padded, reversed or broadcast.
inline Array any_strides(const Shape& shape, DType dtype, Bytes& bytes) {
  static constexpr int kOrders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
  const auto& order = kOrders[bytes.number(0, 5)];
  const std::int64_t sizes[3] = {shape.n, shape.c, shape.l};
  std::int64_t strides[3] = {};
  std::int64_t next = 1;
  for (int i = 2; i >= 0; --i) {
    const int d = order[i];
    const std::uint8_t choice = bytes.next();
    if (choice >> 5 < 3) next += choice >> 5;
    strides[d] = (choice & 7) == 1 ? 0 : next;
    if ((choice & 24) == 8) strides[d] = -strides[d];
    next *= sizes[d];
  }
  return {shape, dtype, {strides[0], strides[1], strides[2]}};
}

struct Case {
  Shape shape;
  DType dtype;
  DType param_dtype;
  Relu relu;
  bool training;
  double momentum;
  double eps;
  bool has_weight, has_bias, has_running;
  bool wants[3];  // gradients
  std::vector<std::uint8_t> weight, bias, running_mean, running_var;
};

struct Result {
  std::vector<std::uint8_t> output, running_mean, running_var, grad_input, grad_weight, grad_bias;
  std::vector<double> mean, invstd;
};

inline ChannelView view_of(bool given, const std::vector<std::uint8_t>& values) {
  return {given ? const_cast<std::uint8_t*>(values.data()) : nullptr, 1};
}

// The arguments of a call for all or some of a case's rows, but for what it writes to besides the statistics.
inline ForwardArgs forward_args(const Case& c, const Shape& shape, Result& r, int threads) {
  ForwardArgs args{};
  args.shape = shape;
  args.dtype = c.dtype;
  args.param_dtype = c.param_dtype;
  args.relu = c.relu;
  args.training = c.training;
  args.weight = view_of(c.has_weight, c.weight);
  args.bias = view_of(c.has_bias, c.bias);
  args.running_mean = view_of(c.has_running, r.running_mean);
  args.running_var = view_of(c.has_running, r.running_var);
  args.momentum = c.momentum;
  args.eps = c.eps;
  args.mean = r.mean.data();
  args.invstd = r.invstd.data();
  args.threads = threads;
  return args;
}

inline BackwardArgs backward_args(const Case& c, const Shape& shape, const Result& r, int threads) {
  BackwardArgs args{};
  args.shape = shape;
  args.dtype = c.dtype;
  args.param_dtype = c.param_dtype;
  args.relu = c.relu;
  args.training = c.training;
  args.weight = view_of(c.has_weight, c.weight);
  args.bias = view_of(c.has_bias, c.bias);
  args.mean = r.mean.data();
  args.invstd = r.invstd.data();
  args.threads = threads;
  return args;
}

// Room for the statistics, and the running ones as they are before the call.
inline Result before_the_call(const Case& c) {
  Result r;
  r.running_mean = c.running_mean;
  r.running_var = c.running_var;
  r.mean.resize(static_cast<std::size_t>(c.shape.c));
  r.invstd.resize(r.mean.size());
  return r;
}

inline Result run(const Case& c, Array& input, Array& grad_output, const KernelTable& table, int threads) {
  const auto channels = static_cast<std::size_t>(c.shape.c);
  const auto count = static_cast<std::size_t>(c.shape.n * c.shape.l) * channels;
  Result r = before_the_call(c);
  r.output.resize(count * size_of(c.dtype));
  r.grad_input.resize(r.output.size());
  r.grad_weight.resize(channels * size_of(c.param_dtype));
  r.grad_bias.resize(r.grad_weight.size());
  std::vector<double> scratch(forward_scratch(c.shape));
  ForwardArgs forward = forward_args(c, c.shape, r, threads);
  forward.input = input.view();
  forward.output = r.output.data();
  forward.scratch = scratch.data();
  table.forward(forward);

  std::vector<double> backward_memory(backward_scratch(c.shape));
  BackwardArgs backward = backward_args(c, c.shape, r, threads);
  backward.grad_output = grad_output.view();
  backward.input = input.view();
  backward.grad_input = c.wants[0] ? r.grad_input.data() : nullptr;
  backward.grad_weight = c.wants[1] ? r.grad_weight.data() : nullptr;
  backward.grad_bias = c.wants[2] ? r.grad_bias.data() : nullptr;
  backward.scratch = backward_memory.data();
  table.backward(backward);
  return r;
}

// A NaN is one whatever its sign and payload, which hardware takes from either operand.
inline bool is_nan(const std::uint8_t* bytes, DType dtype) {
  if (dtype == DType::f64) {
    double value;
    std::memcpy(&value, bytes, sizeof(value));
    return std::isnan(value);
  }
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, bytes, sizeof(value));
    return std::isnan(value);
  }
  std::uint16_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return (bits & 0x7fffU) > (dtype == DType::bf16 ? 0x7f80U : 0x7c00U);
}

inline bool same(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b, DType dtype) {
  const std::size_t step = size_of(dtype);
  for (std::size_t i = 0; i < a.size(); i += step)
    if (std::memcmp(&a[i], &b[i], step) != 0 && !(is_nan(&a[i], dtype) && is_nan(&b[i], dtype))) return false;
  return true;
}

inline bool same(const std::vector<double>& a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(double)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

inline void require_same(const Case& c, const Result& a, const Result& b) {
  require(same(a.output, b.output, c.dtype), "the same output");
  require(same(a.mean, b.mean), "the same mean");
  require(same(a.invstd, b.invstd), "the same invstd");
  require(same(a.running_mean, b.running_mean, c.param_dtype), "the same running mean");
  require(same(a.running_var, b.running_var, c.param_dtype), "the same running variance");
  require(same(a.grad_input, b.grad_input, c.dtype), "the same gradient of the input");
  require(same(a.grad_weight, b.grad_weight, c.param_dtype), "the same gradient of the weight");
  require(same(a.grad_bias, b.grad_bias, c.param_dtype), "the same gradient of the bias");
}

}  // namespace torch_bn::fuzz
