// The kernels on arrays that lie against pages nobody may touch: one element read or written past either end is a
// fault at once, with or without a sanitizer.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "kernels/dispatch.h"
#include "problem.h"

namespace torch_bn::testing {
namespace {

enum class Side { none, begin, end };

// Memory in which every array has pages of its own, between pages that are closed, and closes them when freed.
// Shared by the threads of a test one after the other: no kernel allocates.
class Arena {
 public:
  static Arena& get() {
    static Arena arena;
    return arena;
  }

  // `bytes` right behind a closed page, or right before one.
  void* allocate(std::size_t bytes, Side side) {
    const std::size_t room = pages(bytes);
    char* open = base_ + used_ + page_;
    used_ += room + page_;
    if (used_ + page_ > kSize || mprotect(open, room, PROT_READ | PROT_WRITE) != 0) std::abort();
    return side == Side::begin ? open : open + room - bytes;
  }

  [[nodiscard]] bool owns(const void* pointer) const { return pointer >= base_ && pointer < base_ + kSize; }

  void close(void* pointer, std::size_t bytes) const {
    auto address = reinterpret_cast<std::uintptr_t>(pointer);
    char* open = static_cast<char*>(pointer) - address % page_;
    // Closed and without contents: the address is not used again.
    if (mmap(open, pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
        MAP_FAILED)
      std::abort();
  }

 private:
  static constexpr std::size_t kSize = std::size_t{1} << 36;

  Arena()
      : page_(static_cast<std::size_t>(sysconf(_SC_PAGESIZE))),
        base_(static_cast<char*>(
            mmap(nullptr, kSize, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))) {
    if (base_ == MAP_FAILED) std::abort();
  }

  [[nodiscard]] std::size_t pages(std::size_t bytes) const { return (bytes + page_ - 1) / page_ * page_; }

  std::size_t page_;
  char* base_;
  std::size_t used_ = 0;
};

thread_local Side side_now = Side::none;

// While it lives, arrays that this thread allocates lie against closed pages.
class Guarded {
 public:
  explicit Guarded(Side side) {
    Arena::get();
    side_now = side;
  }
  ~Guarded() { side_now = Side::none; }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
};

}  // namespace
}  // namespace torch_bn::testing

// Every std::vector comes by here; those of the tests hold nothing but numbers.
void* operator new(std::size_t bytes) {
  using namespace torch_bn::testing;
  if (side_now != Side::none && bytes > 0) return Arena::get().allocate(bytes, side_now);
  if (void* memory = std::malloc(bytes > 0 ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory, std::size_t bytes) noexcept {
  using namespace torch_bn::testing;
  if (memory != nullptr && Arena::get().owns(memory)) {
    Arena::get().close(memory, bytes);
  } else {
    std::free(memory);
  }
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}

namespace torch_bn::testing {
namespace {

class Guards : public ::testing::TestWithParam<std::string> {
 protected:
  const KernelTable& table() const { return *find_isa(GetParam()); }

  // The results are those of unguarded arrays, which `kernels_test` looks at.
  template <typename T, typename Draw>
  void expect_inside(Draw draw) {
    for (const Relu relu : {Relu::none, Relu::after, Relu::before}) expect_inside<T>(draw, relu);
  }

  template <typename T, typename Draw>
  void expect_inside(Draw draw, Relu relu) {
    for (const Shape& shape : kShapes)
      for (const Layout layout :
           {Layout::contiguous, Layout::channels_last, Layout::transposed, Layout::padded_rows})
        for (const bool training : {true, false}) {
          Problem<T> problem(shape, 1.0, 2.0, draw);
          problem.relu = relu;
          // Two threads wait for one another long on a machine that is busy, so only where they matter.
          const int threads = layout == Layout::contiguous && training ? 2 : 1;
          const auto want = problem.run(table(), 1, layout, training);
          for (const Side side : {Side::begin, Side::end}) {
            const Guarded guarded(side);
            Problem<T> copy = problem;
            if (!want.same(copy.run(table(), threads, layout, training))) {
              side_now = Side::none;
              ADD_FAILURE() << shape.n << "x" << shape.c << "x" << shape.l;
            }
          }
        }
  }
};

INSTANTIATE_TEST_SUITE_P(Isa, Guards, ::testing::ValuesIn(supported_isas()),
                         [](const auto& info) { return info.param; });

TEST_P(Guards, Float32StaysInside) {
  expect_inside<float>(normal<float>);
}
TEST_P(Guards, Float64StaysInside) {
  expect_inside<double>(normal<double>);
}
TEST_P(Guards, BFloat16StaysInside) {
  expect_inside<BFloat16Bits>(small_numbers<BFloat16Bits>);
}
TEST_P(Guards, Float16StaysInside) {
  expect_inside<Float16Bits>(small_numbers<Float16Bits>);
}

// The guard itself: one float past either end, and any after the end of an array's life, is a fault.
TEST(GuardsDeathTest, FaultPastEitherEndAndAfterwards) {
  const auto read = [](Side side, std::ptrdiff_t offset) {
    std::vector<float> array;
    {
      const Guarded guarded(side);
      array.resize(5);
    }
    const volatile float* data = array.data();
    return data[offset];
  };
  EXPECT_EQ(read(Side::begin, 0) + read(Side::begin, 4) + read(Side::end, 0) + read(Side::end, 4), 0.0F);
  EXPECT_DEATH(read(Side::begin, -1), "");
  EXPECT_DEATH(read(Side::end, 5), "");
  EXPECT_DEATH(
      {
        volatile std::uintptr_t gone = 0;  // a number that the compiler does not follow
        {
          const Guarded guarded(Side::end);
          const std::vector<float> array(5);
          gone = reinterpret_cast<std::uintptr_t>(array.data());
        }
        std::printf("%f", static_cast<double>(*reinterpret_cast<const volatile float*>(std::uintptr_t{gone})));
      },
      "");
}

}  // namespace
}  // namespace torch_bn::testing
