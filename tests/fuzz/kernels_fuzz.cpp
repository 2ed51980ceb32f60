// The kernels' interface with any shape, strides, types, flags and values. Whoever reads or writes outside an
// array is found by the sanitizer; what is required here is that the result depends on nothing but values, shape
// and the order of the input's dimensions: not on strides, threads or instruction set.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernel_case.h"
#include "shares.h"

namespace torch_bn::fuzz {
namespace {

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
  if (!c.training) return 0;

  // The same batch in the hands of one process beside an empty one, and of two.
  require_same_but_parameters(
      c, want, run_in_shares(c, c.shape.n, input, grad_output, *find_isa(supported_isas().back()), threads));
  const std::int64_t first = c.shape.n * (mode >> 3) / 32;
  const Result shared = run_in_shares(c, first, plain_input, plain_grad, *find_isa(supported_isas().front()), 1);
  for (const auto& isa : supported_isas())
    require_same_but_parameters(c, shared, run_in_shares(c, first, input, grad_output, *find_isa(isa), threads));
  return 0;
}
