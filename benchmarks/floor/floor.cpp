// What nothing can beat: a copy of the same bytes, and calls that allocate the same results and compute nothing.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <omp.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../csrc/ops/huge_pages.h"

namespace {

constexpr std::int64_t kLine = 64;
// Elements that one thread takes at least.
constexpr std::int64_t kGrain = 32768;

#if defined(__x86_64__)
// AVX2 by attribute, so that the file is compiled for any x86-64 and asks the processor at run time.
__attribute__((target("avx2"))) void stream(char* to, const char* from, std::int64_t bytes) {
  const std::int64_t head =
      (kLine - static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLine)) % kLine;
  if (bytes <= head + kLine) {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return;
  }
  std::memcpy(to, from, static_cast<std::size_t>(head));
  std::int64_t i = head;
  for (; i + kLine <= bytes; i += kLine) {
    const auto* source = reinterpret_cast<const __m256i*>(from + i);
    auto* target = reinterpret_cast<__m256i*>(to + i);
    const __m256i low = _mm256_loadu_si256(source);
    const __m256i high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
  }
  std::memcpy(to + i, from + i, static_cast<std::size_t>(bytes - i));
  _mm_sfence();
}

bool can_stream() {
  return __builtin_cpu_supports("avx2");
}
#else
void stream(char* to, const char* from, std::int64_t bytes) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

bool can_stream() {
  return false;
}
#endif

using Copy = void (*)(char*, const char*, std::int64_t);

void plain(char* to, const char* from, std::int64_t bytes) {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void copy_bytes(char* to, const char* from, std::int64_t bytes, Copy copy, int threads) {
  if (threads == 1) {
    copy(to, from, bytes);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    // Whole lines to each thread.
    const std::int64_t lines = (bytes + kLine - 1) / kLine;
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t begin = lines * omp_get_thread_num() / team * kLine;
    const std::int64_t end = std::min(bytes, lines * (omp_get_thread_num() + 1) / team * kLine);
    if (begin < end) copy(to + begin, from + begin, end - begin);
  }
}

void copy(const at::Tensor& to, const at::Tensor& from, bool streaming, int threads) {
  TORCH_CHECK(to.is_contiguous() && from.is_contiguous() && to.nbytes() == from.nbytes(),
              "copy: two contiguous tensors of the same bytes are needed");
  copy_bytes(static_cast<char*>(to.mutable_data_ptr()), static_cast<const char*>(from.const_data_ptr()),
             static_cast<std::int64_t>(from.nbytes()), streaming ? stream : plain, threads);
}

// Hands out again what was freed, so that results lie in memory that was used before, for whichever operator
// allocates them. Large pieces are advised to lie in huge pages, as the results of ours are.
class Reusing final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    auto piece = std::make_unique<Piece>(Piece{this, bytes, taken(bytes)});
    void* data = piece->data;
    return {data, piece.release(), &give_back, c10::Device(c10::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  void empty() {
    const std::lock_guard lock(mutex_);
    for (auto& [bytes, pieces] : free_)
      for (void* data : pieces) c10::free_cpu(data);
    free_.clear();
  }

 private:
  struct Piece {
    Reusing* owner;
    std::size_t bytes;
    void* data;
  };

  void* taken(std::size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      std::vector<void*>& pieces = free_[bytes];
      if (!pieces.empty()) {
        void* data = pieces.back();
        pieces.pop_back();
        return data;
      }
    }
    void* data = c10::alloc_cpu(bytes);
    torch_bn::ops::advise_huge_pages(data, bytes);
    return data;
  }

  static void give_back(void* context) {
    const std::unique_ptr<Piece> piece(static_cast<Piece*>(context));
    const std::lock_guard lock(piece->owner->mutex_);
    piece->owner->free_[piece->bytes].push_back(piece->data);
  }

  std::mutex mutex_;
  std::map<std::size_t, std::vector<void*>> free_;
};

// From now on every tensor's memory is reused, or, when switched off, torch's own again and what was kept is
// freed.
void reuse_memory(bool on) {
  static auto* reusing = new Reusing;  // outlives every tensor
  static c10::Allocator* const usual = c10::GetAllocator(c10::kCPU);
  c10::SetAllocator(c10::kCPU, on ? static_cast<c10::Allocator*>(reusing) : usual);
  if (!on) reusing->empty();
}

// The results of a forward, unwritten.
at::Tensor allocate_forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  (void)weight;
  (void)bias;
  at::Tensor output = at::empty(input.sizes(), input.options());
  at::Tensor stats = at::empty({2, input.size(1)}, input.options().dtype(at::kDouble));
  return output;
}

// A differentiable function of a batch norm's inputs whose both passes allocate what a batch norm's do.
class Empty : public torch::autograd::Function<Empty> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const at::Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor output = at::empty(input.sizes(), input.options());
    at::Tensor stats = at::empty({2, input.size(1)}, input.options().dtype(at::kDouble));
    context->save_for_backward({input, weight, bias, stats});
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    (void)gradients;
    const auto saved = context->get_saved_variables();
    return {at::empty(saved[0].sizes(), saved[0].options()), at::empty(saved[1].sizes(), saved[1].options()),
            at::empty(saved[2].sizes(), saved[2].options())};
  }
};

at::Tensor empty_function(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return Empty::apply(input, weight, bias);
}

// The same, handing on its input and the gradient of its output in place of memory that nobody wrote: for
// networks, whose time depends on what their layers are given. It moves no data at all.
class Passing : public torch::autograd::Function<Passing> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const at::Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor stats = at::empty({2, input.size(1)}, input.options().dtype(at::kDouble));
    context->save_for_backward({input, weight, bias, stats});
    return input.detach();
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    return {gradients[0], at::empty(saved[1].sizes(), saved[1].options()),
            at::empty(saved[2].sizes(), saved[2].options())};
  }
};

at::Tensor passing_function(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return Passing::apply(input, weight, bias);
}

// The same with one pass over memory in each direction, where a batch norm needs two: a copy of the input, and a
// gradient written over grad_output from that and the input. For contiguous float32 arrays.
class OnePass : public torch::autograd::Function<OnePass> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const at::Tensor& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor output = at::empty(input.sizes(), input.options());
    at::Tensor stats = at::empty({2, input.size(1)}, input.options().dtype(at::kDouble));
    const float* from = input.const_data_ptr<float>();
    float* to = output.mutable_data_ptr<float>();
    at::parallel_for(0, input.numel(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin) * sizeof(float));
    });
    context->save_for_backward({input, weight, bias, stats});
    return output;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    const auto saved = context->get_saved_variables();
    const float* from = saved[0].const_data_ptr<float>();
    const at::Tensor result = gradients[0].contiguous();
    float* gradient = result.mutable_data_ptr<float>();
    at::parallel_for(0, saved[0].numel(), kGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) gradient[i] -= 1e-6F * from[i];
    });
    return {result, at::empty(saved[1].sizes(), saved[1].options()),
            at::empty(saved[2].sizes(), saved[2].options())};
  }
};

at::Tensor one_pass_function(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return OnePass::apply(input, weight, bias);
}

// The public operator, called by each thread of a parallel region of ours, as a caller with threads of its own
// does.
void inside_a_region(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias, int threads) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("torch_bn::batch_norm", "");
  std::string failure;
#pragma omp parallel num_threads(threads)
  {
    // Grad mode belongs to the thread.
    at::NoGradGuard no_grad;
    try {
      torch::jit::Stack stack{input, weight, bias, c10::IValue(), c10::IValue(), c10::IValue(), true, 0.1, 1e-5};
      op.callBoxed(stack);
    } catch (const std::exception& error) {
#pragma omp critical
      failure = error.what();
    }
  }
  if (!failure.empty()) throw std::runtime_error(failure);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("can_stream", &can_stream, "Whether this processor has the non-temporal copy.");
  m.def("copy", &copy, pybind11::call_guard<pybind11::gil_scoped_release>());
  m.def("reuse_memory", &reuse_memory, "Whether results lie in memory that was used before.");
  m.def("allocate_forward", &allocate_forward);
  m.def("empty_function", &empty_function);
  m.def("passing_function", &passing_function);
  m.def("one_pass_function", &one_pass_function);
  m.def("inside_a_region", &inside_a_region, pybind11::call_guard<pybind11::gil_scoped_release>());
}
