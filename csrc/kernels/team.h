// One parallel region per call: a function runs once on every thread of a team.
//
// Work is shared out by hand and not by worksharing pragmas, because those would bind to the caller's team
// when a serial call is made from inside a parallel region of the user's.
#pragma once

#include <omp.h>

#include "blocks.h"

namespace torch_bn::kernels {
namespace {

// The flush-to-zero and rounding modes of a thread. OpenMP's threads keep the modes they were born with, so
// without this torch.set_flush_denormal would hold for the first thread's share only.
class FloatingPointMode {
 public:
#if defined(__x86_64__)
  FloatingPointMode() : word_(__builtin_ia32_stmxcsr()) {}
  void apply() const { __builtin_ia32_ldmxcsr(word_); }

 private:
  unsigned int word_;
#elif defined(__aarch64__)
  FloatingPointMode() { asm volatile("mrs %0, fpcr" : "=r"(word_)); }
  void apply() const { asm volatile("msr fpcr, %0" : : "r"(word_)); }

 private:
  std::uint64_t word_;
#else
  void apply() const {}
#endif
};

class Team {
 public:
  Team(int rank, int size) : rank_(rank), size_(size) {}

  int size() const { return size_; }

  // This thread's share of `count` items, in order and as even as possible.
  Range share(i64 count) const { return {count * rank_ / size_, count * (rank_ + 1) / size_}; }

  // All threads have done what stands before, and see it. That holds for one thread too, of which a compiler could
  // believe that a result's elements and the doubles that lay in their place never meet.
  void barrier() const {
    asm volatile("" ::: "memory");
    if (size_ > 1) {
#pragma omp barrier
    }
  }

 private:
  int rank_;
  int size_;
};

template <typename Body>
void run_team(int threads, i64 elements, Body body) {
  if (threads <= 1 || elements < kSerialBelow) {
    body(Team(0, 1));
    return;
  }
  const FloatingPointMode callers;
#pragma omp parallel num_threads(threads)
  {
    const FloatingPointMode own;
    callers.apply();
    body(Team(omp_get_thread_num(), omp_get_num_threads()));
    own.apply();
  }
}

}  // namespace
}  // namespace torch_bn::kernels
