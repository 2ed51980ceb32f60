// The kernels of several processes, here called one after the other for every process's share of the rows.
#pragma once

#include "kernels/sync_api.h"
#include "problem.h"

namespace torch_bn::testing {

// What the processes found: outputs and grad_input put together, the rest of each process alone.
template <typename T>
struct SharedResults {
  std::vector<T> output, grad_input;
  std::vector<std::vector<T>> running_mean, running_var;
  std::vector<std::vector<double>> mean, invstd;

  [[nodiscard]] bool same(const SharedResults& other) const {
    bool all = same_bits(output, other.output) && same_bits(grad_input, other.grad_input);
    for (std::size_t p = 0; p < mean.size(); ++p)
      all = all && same_bits(mean[p], other.mean[p]) && same_bits(invstd[p], other.invstd[p]) &&
            same_bits(running_mean[p], other.running_mean[p]) && same_bits(running_var[p], other.running_var[p]);
    return all;
  }
};

// Forward in training and backward of a problem whose batch lies in processes with so many sequences each.
template <typename T>
class SharedRun {
 public:
  SharedRun(const Problem<T>& problem, const std::vector<int64_t>& sizes, const KernelTable& table,
            int threads = 1, Layout layout = Layout::contiguous)
      : problem_(problem), kernels_(*table.sync), threads_(threads) {
    int64_t begin = 0;
    for (const int64_t size : sizes) {
      shares_.emplace_back(problem, begin, size, layout);
      begin += size;
    }
    channels_ = static_cast<std::size_t>(problem.shape.c);
    width_ = static_cast<int64_t>(1 + 2 * channels_);
  }

  SharedResults<T> run() {
    SharedResults<T> r;
    r.output.resize(elements(problem_.shape));
    r.grad_input.resize(elements(problem_.shape));
    gather([&](Share& share, double* values) {
      ForwardArgs args = forward(share);
      kernels_.moments(args, values, values + channels_);
    });
    double rows = 0;
    for (Share& share : shares_) rows += static_cast<double>(share.rows());
    for (std::size_t p = 0; p < shares_.size(); ++p) {
      Share& share = shares_[p];
      r.running_mean.push_back(problem_.bias);
      r.running_var.push_back(problem_.weight);
      for (T& value : r.running_var[p]) value = magnitude(value);
      share.mean.resize(channels_);
      share.invstd.resize(channels_);
      ForwardArgs args = forward(share);
      args.output = r.output.data() + share.begin;
      args.running_mean = {r.running_mean[p].data(), 1};
      args.running_var = {r.running_var[p].data(), 1};
      kernels_.normalise(
          args, Parts{processes(), width_, parts_.data(), parts_.data() + 1, parts_.data() + 1 + channels_});
      r.mean.push_back(share.mean);
      r.invstd.push_back(share.invstd);
    }
    gather([&](Share& share, double* values) {
      BackwardArgs args = backward(share);
      kernels_.sums(args, values, values + channels_);
    });
    for (Share& share : shares_) {
      if (share.shape.n == 0) continue;
      BackwardArgs args = backward(share);
      args.grad_input = r.grad_input.data() + share.begin;
      kernels_.gradient(args,
                        PartialSums{processes(), width_, rows, parts_.data() + 1, parts_.data() + 1 + channels_});
    }
    return r;
  }

 private:
  // The rows of one process, of which there may be none.
  struct Share {
    Shape shape;
    std::size_t begin;  // in elements
    Stored<T> input, grad_output;
    std::vector<double> mean, invstd, scratch;

    Share(const Problem<T>& problem, int64_t first, int64_t size, Layout layout)
        : shape{size, problem.shape.c, problem.shape.l},
          begin(static_cast<std::size_t>(first * shape.c * shape.l)),
          input(at_least_one(), cut(problem.x), layout),
          grad_output(at_least_one(), cut(problem.g), layout) {}

    [[nodiscard]] int64_t rows() const { return shape.n * shape.l; }

   private:
    // Of a process without rows nothing is read.
    [[nodiscard]] Shape at_least_one() const { return {std::max<int64_t>(shape.n, 1), shape.c, shape.l}; }
    std::vector<T> cut(const std::vector<T>& values) const {
      if (shape.n == 0) return std::vector<T>(elements(at_least_one()));
      const auto first = values.begin() + static_cast<std::ptrdiff_t>(begin);
      return {first, first + static_cast<std::ptrdiff_t>(elements(shape))};
    }
  };

  [[nodiscard]] int64_t processes() const { return static_cast<int64_t>(shares_.size()); }

  // Rows and values of every process; `say` is not called for one without rows.
  template <typename Say>
  void gather(Say say) {
    parts_.assign(shares_.size() * static_cast<std::size_t>(width_), 0.0);
    double* part = parts_.data();
    for (Share& share : shares_) {
      part[0] = static_cast<double>(share.rows());
      if (share.shape.n > 0) say(share, part + 1);
      part += width_;
    }
  }

  ForwardArgs forward(Share& share) {
    ForwardArgs args = problem_.forward_args(share.shape, threads_);
    args.input = share.input.view;
    args.mean = share.mean.data();
    args.invstd = share.invstd.data();
    share.scratch.assign(forward_scratch({std::max<int64_t>(share.shape.n, 1), share.shape.c, share.shape.l}),
                         kUnset);
    args.scratch = share.scratch.data();
    return args;
  }

  BackwardArgs backward(Share& share) {
    BackwardArgs args = problem_.backward_args(share.shape, threads_);
    args.grad_output = share.grad_output.view;
    args.input = share.input.view;
    args.mean = share.mean.data();
    args.invstd = share.invstd.data();
    share.scratch.assign(backward_scratch(share.shape), kUnset);
    args.scratch = share.scratch.data();
    return args;
  }

  const Problem<T>& problem_;
  const SyncTable& kernels_;
  int threads_;
  std::size_t channels_;
  int64_t width_;
  std::vector<Share> shares_;
  std::vector<double> parts_;
};

}  // namespace torch_bn::testing
