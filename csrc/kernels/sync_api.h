// The interface of a batch norm whose batch lies in several processes. Between these kernels the caller exchanges
// sums: a forward is moments, exchange, normalise; a backward is sums, exchange, gradient. The batch of one
// process alone gives the bits of the ordinary kernels.
#pragma once

#include <cstdint>

#include "api.h"

namespace torch_bn::kernels {

// What all processes have said of their rows, in the order of their ranks: process p's mean and M2 of every
// channel begin at `mean + p * stride` and `m2 + p * stride`.
struct Parts {
  std::int64_t processes;
  std::int64_t stride;
  const double* count;  // rows of process p at `count + p * stride`; whole numbers, zero included
  const double* mean;
  const double* m2;
};

// The sums of all processes' rows, laid out alike.
struct PartialSums {
  std::int64_t processes;
  std::int64_t stride;
  double rows;          // of all processes together
  const double* total;  // sum(g)
  const double* dot;    // sum(g * (x - mean))
};

// The arguments are those of the ordinary kernels, each of which reads and writes what it needs of them.
struct SyncTable {
  // Mean and M2 of the local rows. At least one row.
  void (*moments)(const ForwardArgs&, double* mean, double* m2);
  // Merged statistics to `mean` and `invstd`, the running ones, and the output of the local rows, of which there
  // may be none. At least one row in all processes together.
  void (*normalise)(const ForwardArgs&, const Parts&);
  // Sums of the local rows with the mean of all. At least one row.
  void (*sums)(const BackwardArgs&, double* total, double* dot);
  // grad_input of the local rows. At least one row.
  void (*gradient)(const BackwardArgs&, const PartialSums&);
};

}  // namespace torch_bn::kernels
