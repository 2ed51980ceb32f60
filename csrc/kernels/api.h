// The interface of the torch-free kernels: raw pointers, sizes and strides in, results out.
//
// Nothing here knows a tensor. A caller describes an (N, C, L) array by its first element and the strides
// of its three dimensions; (N, C) is the case L = 1. Results are always written contiguously.
//
// Same bits: a result depends on the values, the shape and, for long lines (n, c, :), on whether l or c lies
// innermost. It does not depend on the number of threads, on other strides, or on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_bn::kernels {

// Element types, in storage. Sums are in double; what is done element by element is in float32, or in double
// for float64 and for channels whose coefficients lie outside float32's range.
enum class DType : std::uint8_t { f32, f64, bf16, f16 };

// A ReLU next to the batch norm, done in the same sweeps: y = bn(x), relu(bn(x)) or bn(relu(x)).
enum class Relu : std::uint8_t { none, after, before };

// Sizes of an array whose "rows" are the N * L positions over which a channel's statistics are taken.
struct Shape {
  std::int64_t n;
  std::int64_t c;
  std::int64_t l;
};

// A read-only (N, C, L) array of any layout; strides in elements, zero and negative ones included.
struct ArrayView {
  const void* data;
  std::int64_t stride_n;
  std::int64_t stride_c;
  std::int64_t stride_l;
};

// One value per channel; `data` is null where the caller has none.
struct ChannelView {
  void* data;
  std::int64_t stride;
};

// Training forward, or evaluation forward when `training` is false. A training forward leaves in scratch the
// batch's means, and behind them its sums of squared deviations: 2 * C doubles, whether or not there are running
// statistics.
struct ForwardArgs {
  Shape shape;
  DType dtype;        // of input and output
  DType param_dtype;  // of weight, bias and the running statistics
  Relu relu;
  bool training;
  ArrayView input;
  void* output;  // contiguous (N, C, L)
  ChannelView weight;
  ChannelView bias;
  ChannelView running_mean;  // read in evaluation, updated in training
  ChannelView running_var;
  double momentum;  // weight of the new statistics in the running ones
  double eps;
  double* mean;              // (C) written: the statistics that normalised the output
  double* invstd;            // (C) written
  double* scratch;           // forward_scratch(shape) doubles
  std::int64_t stream_from;  // bytes of output from which on it is written past the caches
  int threads;
};

// Gradients; each of the three outputs may be null when it is not asked for. Where sums were taken they are left
// in scratch, 2 * C doubles: those of grad_output, and behind them of grad_output * (input - mean).
struct BackwardArgs {
  Shape shape;
  DType dtype;
  DType param_dtype;
  Relu relu;
  bool training;
  ArrayView grad_output;
  ArrayView input;
  ChannelView weight;
  ChannelView bias;          // read only where a ReLU comes after: its mask is computed again
  const double* mean;        // (C) from the forward
  const double* invstd;      // (C)
  void* grad_input;          // contiguous (N, C, L), dtype; may be a contiguous grad_output
  void* grad_weight;         // (C), param_dtype
  void* grad_bias;           // (C), param_dtype
  double* scratch;           // backward_scratch(shape) doubles
  std::int64_t stream_from;  // as in the forward, for grad_input
  int threads;
};

// How many doubles of scratch a call needs; a function of the shape alone.
std::size_t forward_scratch(const Shape& shape);
std::size_t backward_scratch(const Shape& shape);

struct SyncTable;  // see sync_api.h

// The kernels of one instruction set.
struct KernelTable {
  const char* isa;
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  const SyncTable* sync;
};

}  // namespace torch_bn::kernels
