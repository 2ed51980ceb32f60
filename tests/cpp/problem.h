// One call of the kernels, forward and backward, on data of any element type and layout.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/blocks.h"
#include "kernels/dispatch.h"
#include "reference.h"

namespace torch_bn::testing {

using namespace torch_bn::kernels;

// Shapes around every edge of the partition: one row short of and beyond a block, a lane, a tile, a segment, and
// some channels and rows beyond what is summed at a time; the last matrix can be written past the caches. Lines
// short and long, that fill their lanes and that do not.
inline const Shape kShapes[] = {{2, 1, 1},    {3, 7, 1},     {64, 100, 1}, {127, 33, 1},   {128, 32, 1},
                                {129, 31, 1}, {257, 5, 1},   {8191, 3, 1}, {8193, 9, 1},   {20001, 17, 1},
                                {4, 5, 6},    {1, 3, 2},     {3, 33, 50},  {2, 40, 129},   {130, 2, 64},
                                {1, 1, 9000}, {300, 300, 1}, {7, 64, 128}, {131, 1030, 1}, {130, 1040, 1},
                                {3, 300, 37}, {5, 9, 700}};

// The two 16-bit types as their bits.
struct BFloat16Bits {
  std::uint16_t bits;
};
struct Float16Bits {
  std::uint16_t bits;
};

template <typename T>
constexpr DType dtype_of = DType::f32;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<BFloat16Bits> = DType::bf16;
template <>
inline constexpr DType dtype_of<Float16Bits> = DType::f16;

// Finite numbers of a 16-bit type, up to 2 in size.
template <typename Bits>
std::vector<Bits> small_numbers(std::size_t count, double /*mean*/, double /*std*/, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<Bits> values(count);
  for (Bits& value : values) value.bits = static_cast<std::uint16_t>(generator() & 0xbfffU);  // finite
  return values;
}

// What working memory holds that no kernel has written to: a caller does not clear it.
constexpr double kUnset = std::numeric_limits<double>::quiet_NaN();

// How an (N, C, L) array lies in memory.
enum class Layout { contiguous, channels_last, transposed, padded_rows };

template <typename T>
struct Stored {
  std::vector<T> memory;
  ArrayView view{};

  Stored(const Shape& s, const std::vector<T>& values, Layout layout) {
    switch (layout) {
      case Layout::contiguous:
        view = {nullptr, s.c * s.l, s.l, 1};
        break;
      case Layout::channels_last:
        view = {nullptr, s.c * s.l, 1, s.c};
        break;
      case Layout::transposed:
        view = {nullptr, 1, s.n * s.l, s.n};
        break;
      case Layout::padded_rows:
        view = {nullptr, s.c * s.l + 3, s.l, 1};
        break;
    }
    // As far as the last element and no further: the tests with guard pages see whoever reads beyond it.
    const int64_t last = (s.n - 1) * view.stride_n + (s.c - 1) * view.stride_c + (s.l - 1) * view.stride_l;
    memory.assign(static_cast<std::size_t>(last + 1), T{});
    std::memset(memory.data(), 0xff, memory.size() * sizeof(T));  // NaN in every type: padding is never read
    for (int64_t n = 0; n < s.n; ++n)
      for (int64_t c = 0; c < s.c; ++c)
        for (int64_t l = 0; l < s.l; ++l)
          memory[static_cast<std::size_t>(n * view.stride_n + c * view.stride_c + l * view.stride_l)] =
              values[at(s, n, c, l)];
    view.data = memory.data();
  }
};

constexpr int kWhereverItLies = -1;

// Where a kernel writes what is to end in `values`: there, or some elements behind the start of a cache line, at
// which streaming stores need it.
template <typename T>
class Target {
 public:
  Target(std::vector<T>& values, int offset)
      : values_(values), offset_(offset), room_(offset < 0 ? 0 : values.size() + offset + 64 / sizeof(T)) {}

  T* data() {
    if (room_.empty()) return values_.data();
    const auto address = reinterpret_cast<std::uintptr_t>(room_.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64) + offset_;
  }
  void fill() {
    if (!room_.empty()) std::memcpy(data(), values_.data(), values_.size() * sizeof(T));
  }
  void done() {
    if (!room_.empty()) std::memcpy(values_.data(), data(), values_.size() * sizeof(T));
  }

 private:
  std::vector<T>& values_;
  int offset_;
  std::vector<T> room_;
};

// How many doubles of working memory have been written from some position on.
inline std::int64_t written_from(const std::vector<double>& scratch, std::int64_t begin) {
  std::int64_t count = 0;
  for (std::size_t i = begin; i < scratch.size(); ++i)
    count += std::memcmp(&scratch[i], &kUnset, sizeof(double)) != 0 ? 1 : 0;
  return count;
}

template <typename T>
struct Results {
  std::vector<T> output, grad_input, grad_weight, grad_bias, running_mean, running_var;
  std::vector<double> mean, invstd;
  std::int64_t forward_partials = 0;  // doubles of scratch that took the partial results of all segments but one
  std::int64_t backward_partials = 0;
  [[nodiscard]] bool same(const Results& other) const {
    return same_bits(output, other.output) && same_bits(grad_input, other.grad_input) &&
           same_bits(grad_weight, other.grad_weight) && same_bits(grad_bias, other.grad_bias) &&
           same_bits(running_mean, other.running_mean) && same_bits(running_var, other.running_var) &&
           same_bits(mean, other.mean) && same_bits(invstd, other.invstd);
  }
};

// |value|, a variance.
inline float magnitude(float value) {
  return value < 0 ? -value : value;
}
inline double magnitude(double value) {
  return value < 0 ? -value : value;
}
template <typename Bits>
Bits magnitude(Bits value) {
  return {static_cast<std::uint16_t>(value.bits & 0x7fffU)};
}

template <typename T>
struct Problem {
  Shape shape;
  std::vector<T> x, g, weight, bias;
  double eps = 1e-5;
  double momentum = 0.25;
  Relu relu = Relu::none;
  std::int64_t stream_from = std::int64_t{1} << 40;
  bool in_place = false;         // grad_input over a contiguous grad_output
  int offset = kWhereverItLies;  // of the results from a cache line

  // Random data from four seeds; `draw(count, mean, std, seed)` returns the values.
  template <typename Draw>
  Problem(Shape s, double mean, double std, Draw draw)
      : shape(s),
        x(draw(elements(s), mean, std, 1)),
        g(draw(elements(s), 0, 1, 2)),
        weight(draw(static_cast<std::size_t>(s.c), 1, 0.5, 3)),
        bias(draw(static_cast<std::size_t>(s.c), 0, 1, 4)) {}
  Problem(Shape s, double mean, double std) : Problem(s, mean, std, normal<T>) {}

  // The arguments of a call for all or some of the rows, but for the arrays.
  ForwardArgs forward_args(const Shape& rows, int threads) const {
    ForwardArgs args{};
    args.shape = rows;
    args.dtype = args.param_dtype = dtype_of<T>;
    args.relu = relu;
    args.training = true;
    args.weight = {const_cast<T*>(weight.data()), 1};
    args.bias = {const_cast<T*>(bias.data()), 1};
    args.momentum = momentum;
    args.eps = eps;
    args.threads = threads;
    args.stream_from = stream_from;
    return args;
  }
  BackwardArgs backward_args(const Shape& rows, int threads) const {
    BackwardArgs args{};
    args.shape = rows;
    args.dtype = args.param_dtype = dtype_of<T>;
    args.relu = relu;
    args.training = true;
    args.weight = {const_cast<T*>(weight.data()), 1};
    args.bias = {const_cast<T*>(bias.data()), 1};
    args.threads = threads;
    args.stream_from = stream_from;
    return args;
  }

  // Forward in training and backward.
  Results<T> run(const KernelTable& table, int threads = 1, Layout layout = Layout::contiguous,
                 bool training = true) {
    const auto c = static_cast<std::size_t>(shape.c);
    const Stored<T> input(shape, x, layout);
    const Stored<T> grad_output(shape, g, layout);
    Results<T> r;
    r.output.resize(elements(shape));
    r.grad_input.resize(elements(shape));
    r.grad_weight.resize(c);
    r.grad_bias.resize(c);
    r.running_mean = bias;
    r.running_var = weight;
    for (T& value : r.running_var) value = magnitude(value);
    r.mean.resize(c);
    r.invstd.resize(c);
    std::vector<double> scratch(forward_scratch(shape), kUnset);
    ForwardArgs forward = forward_args(shape, threads);
    forward.training = training;
    forward.input = input.view;
    const int placed = stream_from == 0 && offset < 0 ? 0 : offset;
    Target<T> output(r.output, placed);
    forward.output = output.data();
    forward.running_mean = {r.running_mean.data(), 1};
    forward.running_var = {r.running_var.data(), 1};
    forward.mean = r.mean.data();
    forward.invstd = r.invstd.data();
    forward.scratch = scratch.data();
    table.forward(forward);
    output.done();
    r.forward_partials =
        written_from(scratch, (kForwardPartials + kForwardCoefficients) * shape.c + kAlignmentRoom);

    scratch.assign(backward_scratch(shape), kUnset);
    BackwardArgs backward = backward_args(shape, threads);
    backward.training = training;
    backward.grad_output = grad_output.view;
    backward.input = input.view;
    backward.mean = r.mean.data();
    backward.invstd = r.invstd.data();
    if (in_place) r.grad_input = g;
    Target<T> grad_input(r.grad_input, placed);
    backward.grad_input = grad_input.data();
    backward.grad_weight = r.grad_weight.data();
    backward.grad_bias = r.grad_bias.data();
    backward.scratch = scratch.data();
    if (in_place) {
      grad_input.fill();
      backward.grad_output = {grad_input.data(), shape.c * shape.l, shape.l, 1};
    }
    table.backward(backward);
    grad_input.done();
    r.backward_partials =
        written_from(scratch, (kBackwardPartials + kBackwardCoefficients) * shape.c + kAlignmentRoom);
    return r;
  }
};

}  // namespace torch_bn::testing
