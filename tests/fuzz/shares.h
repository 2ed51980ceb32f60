// The kernels of several processes on a case whose batch lies in two of them.
#pragma once

#include <algorithm>

#include "kernel_case.h"
#include "kernels/sync_api.h"

namespace torch_bn::fuzz {

// Statistics are those of the first process, which the second is required to share. The parameters' gradients are
// made elsewhere, from the sums.
inline Result run_in_shares(const Case& c, std::int64_t first_rows, Array& input, Array& grad_output,
                            const KernelTable& table, int threads) {
  constexpr int kProcesses = 2;
  const auto channels = static_cast<std::size_t>(c.shape.c);
  const auto width = 1 + 2 * channels;
  const std::int64_t begins[] = {0, first_rows, c.shape.n};
  const auto count = static_cast<std::size_t>(c.shape.n * c.shape.l) * channels;
  Result results[kProcesses] = {before_the_call(c), before_the_call(c)};
  std::vector<std::uint8_t> output(count * size_of(c.dtype));
  std::vector<std::uint8_t> grad_input(output.size());
  const auto shape_of = [&](int p) { return Shape{begins[p + 1] - begins[p], c.shape.c, c.shape.l}; };
  const auto offset = [&](int p) {
    return static_cast<std::size_t>(begins[p] * c.shape.c * c.shape.l) * size_of(c.dtype);
  };
  std::vector<double> scratch;
  const auto forward = [&](int p) {
    ForwardArgs args = forward_args(c, shape_of(p), results[p], threads);
    if (args.shape.n > 0) args.input = input.view_from(begins[p]);
    args.output = output.data() + offset(p);
    scratch.assign(forward_scratch({std::max<std::int64_t>(args.shape.n, 1), c.shape.c, c.shape.l}), 0);
    args.scratch = scratch.data();
    return args;
  };
  const auto backward = [&](int p) {
    BackwardArgs args = backward_args(c, shape_of(p), results[p], threads);
    args.grad_output = grad_output.view_from(begins[p]);
    args.input = input.view_from(begins[p]);
    args.grad_input = grad_input.data() + offset(p);
    scratch.assign(backward_scratch(args.shape), 0);
    args.scratch = scratch.data();
    return args;
  };

  std::vector<double> parts(kProcesses * width);
  for (int p = 0; p < kProcesses; ++p) {
    double* part = &parts[static_cast<std::size_t>(p) * width];
    part[0] = static_cast<double>(shape_of(p).n * c.shape.l);
    if (part[0] > 0) table.sync->moments(forward(p), part + 1, part + 1 + channels);
  }
  const auto stride = static_cast<std::int64_t>(width);
  for (int p = 0; p < kProcesses; ++p)
    table.sync->normalise(forward(p), Parts{kProcesses, stride, &parts[0], &parts[1], &parts[1 + channels]});
  require(same(results[0].mean, results[1].mean), "the same mean in both processes");
  require(same(results[0].running_var, results[1].running_var, c.param_dtype),
          "the same running variance in both processes");

  std::vector<double> sums(kProcesses * width);
  for (int p = 0; p < kProcesses; ++p) {
    double* part = &sums[static_cast<std::size_t>(p) * width];
    if (shape_of(p).n > 0) table.sync->sums(backward(p), part + 1, part + 1 + channels);
  }
  const double rows = static_cast<double>(c.shape.n * c.shape.l);
  for (int p = 0; p < kProcesses; ++p)
    if (shape_of(p).n > 0)
      table.sync->gradient(backward(p), PartialSums{kProcesses, stride, rows, &sums[1], &sums[1 + channels]});
  results[0].output = output;
  results[0].grad_input = grad_input;
  return results[0];
}

inline void require_same_but_parameters(const Case& c, const Result& a, const Result& b) {
  require(same(a.output, b.output, c.dtype), "the same output in shares");
  require(same(a.mean, b.mean), "the same mean in shares");
  require(same(a.invstd, b.invstd), "the same invstd in shares");
  require(same(a.running_mean, b.running_mean, c.param_dtype), "the same running mean in shares");
  require(same(a.running_var, b.running_var, c.param_dtype), "the same running variance in shares");
  if (c.wants[0]) require(same(a.grad_input, b.grad_input, c.dtype), "the same gradient of the input in shares");
}

}  // namespace torch_bn::fuzz
