// The torch-free kernels of every instruction set that this processor has, beside memcpy with as many threads.
//
// Time is that of one call on preallocated results; bytes per second count the input read and as much written,
// so that a kernel's share of memcpy's figure can be read off. Names are kernel/set/shape/threads:
//
//   kernels_bench --benchmark_filter='forward/avx2/.*threads:1'
#include <benchmark/benchmark.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/dispatch.h"

namespace {

using namespace torch_bn::kernels;

constexpr Shape kShapes[] = {{64, 100, 1},    {256, 1024, 1},  {1024, 1024, 1}, {4096, 1024, 1},
                             {65536, 256, 1}, {512, 16384, 1}, {32, 64, 512}};

std::size_t elements(const Shape& shape) {
  return static_cast<std::size_t>(shape.n * shape.c * shape.l);
}

std::string name_of(const Shape& shape) {
  std::string name = std::to_string(shape.n).append("x").append(std::to_string(shape.c));
  if (shape.l > 1) name.append("x").append(std::to_string(shape.l));
  return name;
}

// Values between 0 and 1, of no pattern that a kernel could profit from.
std::vector<float> values(std::size_t count) {
  std::vector<float> made(count);
  std::uint32_t state = 1;
  for (float& value : made) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<float>(state >> 8) * 0x1p-24F;
  }
  return made;
}

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};
using Array = std::unique_ptr<float, Free>;

// Where torch's allocator starts tensors, and streaming stores need them to.
Array at_cache_line(std::size_t count) {
  return Array(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
}

// The arrays of one shape and the arguments that point at them.
class Work {
 public:
  Work(const Shape& shape, int threads)
      : x_(values(elements(shape))),
        g_(values(elements(shape))),
        output_(at_cache_line(elements(shape))),
        weight_(static_cast<std::size_t>(shape.c), 1.0F),
        bias_(weight_.size()),
        running_mean_(weight_.size()),
        running_var_(weight_.size(), 1.0F),
        grad_weight_(weight_.size()),
        grad_bias_(weight_.size()),
        statistics_(2 * weight_.size()),
        scratch_(std::max(forward_scratch(shape), backward_scratch(shape))) {
    const std::int64_t row = shape.c * shape.l;
    forward.shape = backward.shape = shape;
    forward.dtype = forward.param_dtype = backward.dtype = backward.param_dtype = DType::f32;
    forward.training = backward.training = true;
    forward.input = backward.input = {x_.data(), row, shape.l, 1};
    forward.output = backward.grad_input = output_.get();
    forward.weight = backward.weight = {weight_.data(), 1};
    forward.bias = {bias_.data(), 1};
    forward.running_mean = {running_mean_.data(), 1};
    forward.running_var = {running_var_.data(), 1};
    forward.momentum = 0.1;
    forward.eps = 1e-5;
    forward.mean = statistics_.data();
    forward.invstd = statistics_.data() + shape.c;
    backward.mean = forward.mean;
    backward.invstd = forward.invstd;
    backward.grad_output = {g_.data(), row, shape.l, 1};
    backward.grad_weight = grad_weight_.data();
    backward.grad_bias = grad_bias_.data();
    forward.scratch = backward.scratch = scratch_.data();
    forward.threads = backward.threads = threads;
    forward.stream_from = backward.stream_from = stream_from();
  }
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  [[nodiscard]] const char* source() const { return reinterpret_cast<const char*>(x_.data()); }
  [[nodiscard]] char* target() { return reinterpret_cast<char*>(output_.get()); }
  [[nodiscard]] std::int64_t bytes() const { return static_cast<std::int64_t>(x_.size() * sizeof(float)); }

  ForwardArgs forward{};
  BackwardArgs backward{};

 private:
  std::vector<float> x_, g_;
  Array output_;
  std::vector<float> weight_, bias_, running_mean_, running_var_, grad_weight_, grad_bias_;
  std::vector<double> statistics_, scratch_;
};

void copy(Work& work, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t begin = work.bytes() * omp_get_thread_num() / team;
    const std::int64_t end = work.bytes() * (omp_get_thread_num() + 1) / team;
    std::memcpy(work.target() + begin, work.source() + begin, static_cast<std::size_t>(end - begin));
  }
}

template <typename Call>
void add(const std::string& name, const Shape& shape, int threads, Call call) {
  const std::string full = name + "/" + name_of(shape) + "/threads:" + std::to_string(threads);
  benchmark::RegisterBenchmark(full.c_str(), [=](benchmark::State& state) {
    Work work(shape, threads);
    call(work);
    for (auto _ : state) {
      call(work);
      benchmark::ClobberMemory();
    }
    state.SetBytesProcessed(state.iterations() * 2 * work.bytes());
  })->UseRealTime();
}

void add_all(const Shape& shape, int threads) {
  add("memcpy", shape, threads, [threads](Work& work) { copy(work, threads); });
  for (const std::string& isa : supported_isas()) {
    const KernelTable* table = find_isa(isa);
    add("forward/" + isa, shape, threads, [table](Work& work) { table->forward(work.forward); });
    // The statistics are zero: a backward takes as long whatever they are.
    add("backward/" + isa, shape, threads, [table](Work& work) { table->backward(work.backward); });
    add("evaluation/" + isa, shape, threads, [table](Work& work) {
      work.forward.training = false;
      table->forward(work.forward);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  std::vector<int> teams{1};
  if (omp_get_max_threads() > 1) teams.push_back(omp_get_max_threads());
  for (const Shape& shape : kShapes)
    for (const int threads : teams) add_all(shape, threads);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
