// The kernels' interface with any shape, strides, types, flags and values. Whoever reads or writes outside an
// array is found by the sanitizer; what is required here is that the result depends on nothing but values, shape
// and the order of the input's dimensions: not on strides, threads or instruction set.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bytes.h"
#include "kernels/blocks.h"
#include "kernels/dispatch.h"

namespace torch_bn::fuzz {
namespace {

using namespace torch_bn::kernels;

std::size_t size_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Ordinary numbers, between 1/8 and 8 in size, of any sign and mantissa.
void fill_with_numbers(std::vector<std::uint8_t>& memory, DType dtype, std::uint64_t seed) {
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
  ArrayView view() { return {at(0, 0, 0), strides[0], strides[1], strides[2]}; }
};

Array contiguous(const Shape& shape, DType dtype) {
  return {shape, dtype, {shape.c * shape.l, shape.l, 1}};
}

// Dense, with the dimensions in the order that decides how the sums of `input` run.
Array dense_like(const Array& input, const Shape& shape, DType dtype) {
  const bool channels_last =
      shape.l >= kMinLine && shape.c > 1 && std::abs(input.strides[2]) > std::abs(input.strides[1]);
  if (channels_last) return {shape, dtype, {shape.c * shape.l, 1, shape.c}};
  return contiguous(shape, dtype);
}

// Dense in some order of the dimensions, then perhaps padded, reversed or broadcast.
Array any_strides(const Shape& shape, DType dtype, Bytes& bytes) {
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

Result run(const Case& c, Array& input, Array& grad_output, const KernelTable& table, int threads) {
  const auto channels = static_cast<std::size_t>(c.shape.c);
  const auto count = static_cast<std::size_t>(c.shape.n * c.shape.l) * channels;
  Result r;
  r.output.resize(count * size_of(c.dtype));
  r.grad_input.resize(r.output.size());
  r.grad_weight.resize(channels * size_of(c.param_dtype));
  r.grad_bias.resize(r.grad_weight.size());
  r.running_mean = c.running_mean;
  r.running_var = c.running_var;
  r.mean.resize(channels);
  r.invstd.resize(channels);
  auto view = [](bool given, const std::vector<std::uint8_t>& values) {
    return ChannelView{given ? const_cast<std::uint8_t*>(values.data()) : nullptr, 1};
  };
  std::vector<double> scratch(forward_scratch(c.shape));
  ForwardArgs forward{};
  forward.shape = c.shape;
  forward.dtype = c.dtype;
  forward.param_dtype = c.param_dtype;
  forward.relu = c.relu;
  forward.training = c.training;
  forward.input = input.view();
  forward.output = r.output.data();
  forward.weight = view(c.has_weight, c.weight);
  forward.bias = view(c.has_bias, c.bias);
  forward.running_mean = view(c.has_running, r.running_mean);
  forward.running_var = view(c.has_running, r.running_var);
  forward.momentum = c.momentum;
  forward.eps = c.eps;
  forward.mean = r.mean.data();
  forward.invstd = r.invstd.data();
  forward.scratch = scratch.data();
  forward.threads = threads;
  table.forward(forward);

  std::vector<double> backward_memory(backward_scratch(c.shape));
  BackwardArgs backward{};
  backward.shape = c.shape;
  backward.dtype = c.dtype;
  backward.param_dtype = c.param_dtype;
  backward.relu = c.relu;
  backward.training = c.training;
  backward.grad_output = grad_output.view();
  backward.input = input.view();
  backward.weight = view(c.has_weight, c.weight);
  backward.bias = view(c.has_bias, c.bias);
  backward.mean = r.mean.data();
  backward.invstd = r.invstd.data();
  backward.grad_input = c.wants[0] ? r.grad_input.data() : nullptr;
  backward.grad_weight = c.wants[1] ? r.grad_weight.data() : nullptr;
  backward.grad_bias = c.wants[2] ? r.grad_bias.data() : nullptr;
  backward.scratch = backward_memory.data();
  backward.threads = threads;
  table.backward(backward);
  return r;
}

// A NaN is one whatever its sign and payload, which hardware takes from either operand.
bool is_nan(const std::uint8_t* bytes, DType dtype) {
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

bool same(const std::vector<std::uint8_t>& a, const std::vector<std::uint8_t>& b, DType dtype) {
  const std::size_t step = size_of(dtype);
  for (std::size_t i = 0; i < a.size(); i += step)
    if (std::memcmp(&a[i], &b[i], step) != 0 && !(is_nan(&a[i], dtype) && is_nan(&b[i], dtype))) return false;
  return true;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(double)) != 0 && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

void require_same(const Case& c, const Result& a, const Result& b) {
  require(same(a.output, b.output, c.dtype), "the same output");
  require(same(a.mean, b.mean), "the same mean");
  require(same(a.invstd, b.invstd), "the same invstd");
  require(same(a.running_mean, b.running_mean, c.param_dtype), "the same running mean");
  require(same(a.running_var, b.running_var, c.param_dtype), "the same running variance");
  require(same(a.grad_input, b.grad_input, c.dtype), "the same gradient of the input");
  require(same(a.grad_weight, b.grad_weight, c.param_dtype), "the same gradient of the weight");
  require(same(a.grad_bias, b.grad_bias, c.param_dtype), "the same gradient of the bias");
}

Shape any_shape(Bytes& bytes) {
  Shape shape{bytes.number(1, 700), bytes.number(1, 300), bytes.flag() ? bytes.number(1, 300) : 1};
  // Small: what is looked for are edges, of which there are enough.
  constexpr std::int64_t kElements = 6000;
  shape.c = std::min(shape.c, std::max<std::int64_t>(1, kElements / shape.n));
  shape.l = std::min(shape.l, std::max<std::int64_t>(1, kElements / (shape.n * shape.c)));
  return shape;
}

}  // namespace
}  // namespace torch_bn::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace torch_bn::fuzz;
  Bytes bytes(data, size);
  Case c{};
  c.shape = any_shape(bytes);
  c.dtype = static_cast<DType>(bytes.number(0, 3));
  const bool has_16_bits = c.dtype == DType::bf16 || c.dtype == DType::f16;
  c.param_dtype = has_16_bits && bytes.flag() ? DType::f32 : c.dtype;
  const std::uint8_t mode = bytes.next();
  c.relu = static_cast<Relu>((mode >> 1) % 3);
  c.training = (mode & 1) != 0 && c.shape.n * c.shape.l > 1;  // one value has no variance
  c.momentum = static_cast<double>(bytes.next()) / 128;
  c.eps = c.training || bytes.flag() ? static_cast<double>(1 + bytes.next()) * 1e-5 : 0.0;
  c.has_weight = bytes.flag();
  c.has_bias = bytes.flag();
  c.has_running = !c.training || bytes.flag();
  for (bool& wanted : c.wants) wanted = bytes.flag();
  Array input = any_strides(c.shape, c.dtype, bytes);
  Array grad_output = any_strides(c.shape, c.dtype, bytes);
  const int threads = static_cast<int>(bytes.number(1, 3));
  // Bits of the fuzzer's, which are rarely numbers to compute with, or ordinary ones.
  const bool is_raw = bytes.flag();
  std::uint64_t seed = bytes.next();
  const auto fill = [&](std::vector<std::uint8_t>& memory, DType dtype) {
    if (is_raw) {
      bytes.fill(memory.data(), memory.size());
    } else {
      fill_with_numbers(memory, dtype, ++seed);
    }
  };
  for (auto* values : {&c.weight, &c.bias, &c.running_mean, &c.running_var}) {
    values->resize(static_cast<std::size_t>(c.shape.c) * size_of(c.param_dtype));
    fill(*values, c.param_dtype);
  }
  fill(grad_output.memory, c.dtype);
  fill(input.memory, c.dtype);

  Array plain_input = dense_like(input, c.shape, c.dtype);
  Array plain_grad = contiguous(c.shape, c.dtype);
  for (std::int64_t n = 0; n < c.shape.n; ++n)
    for (std::int64_t k = 0; k < c.shape.c; ++k)
      for (std::int64_t l = 0; l < c.shape.l; ++l) {
        std::memcpy(plain_input.at(n, k, l), input.at(n, k, l), input.element);
        std::memcpy(plain_grad.at(n, k, l), grad_output.at(n, k, l), grad_output.element);
      }
  const Result want = run(c, plain_input, plain_grad, *find_isa(supported_isas().front()), 1);
  for (const auto& isa : supported_isas())
    require_same(c, want, run(c, input, grad_output, *find_isa(isa), threads));
  return 0;
}
