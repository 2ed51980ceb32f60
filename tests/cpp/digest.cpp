// Prints a digest of the results for every element type and shape, without the name of the instruction set:
// two machines, or two sets, agree in every bit if the outputs are the same text.
//
// The data come from integer arithmetic and exact scalings, never from a library's logarithm, so that they
// are the same everywhere.
#include <cstdio>
#include <string>

#include "shares.h"

namespace torch_bn::testing {
namespace {

class Hash {  // FNV-1a
 public:
  template <typename T>
  void add(const std::vector<T>& values) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) hash_ = (hash_ ^ bytes[i]) * 0x100000001b3ULL;
  }
  [[nodiscard]] unsigned long long value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325ULL;
};

// Uniform numbers around `mean`, on a grid of 2^-20 steps.
template <typename T>
std::vector<T> uniform(std::size_t count, double mean, double std, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::vector<T> values(count);
  for (T& value : values)
    value = static_cast<T>(mean + std * (static_cast<double>(generator() >> 43) * 0x1p-20 - 1.0));
  return values;
}

template <>
std::vector<BFloat16Bits> uniform(std::size_t count, double mean, double std, unsigned seed) {
  std::vector<BFloat16Bits> values;
  for (const float value : uniform<float>(count, mean, std, seed)) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    values.push_back({static_cast<std::uint16_t>(bits >> 16)});
  }
  return values;
}

// Any sign and mantissa; exponents from 2^-16, where numbers are subnormal, to 2^3.
template <>
std::vector<Float16Bits> uniform(std::size_t count, double /*mean*/, double /*std*/, unsigned seed) {
  std::mt19937_64 generator(seed);
  std::vector<Float16Bits> values(count);
  for (Float16Bits& value : values) {
    const std::uint64_t random = generator();
    value.bits = static_cast<std::uint16_t>((random & 0x83ffU) | (((random >> 16) % 19) << 10));
  }
  return values;
}

template <typename T>
void print(const char* name, const KernelTable& table) {
  for (const Shape& shape : kShapes)
    for (const int mode : {0, 1, 2, 3, 4, 5}) {
      const bool training = mode % 2 == 0;
      static constexpr const char* kRelu[] = {"", " relu after", " relu before"};
      Problem<T> problem(shape, 3.0, 2.0, uniform<T>);
      problem.relu = static_cast<Relu>(mode / 2);
      const auto results = problem.run(table, 2, Layout::contiguous, training);
      Hash hash;
      hash.add(results.output);
      hash.add(results.grad_input);
      hash.add(results.grad_weight);
      hash.add(results.grad_bias);
      hash.add(results.running_mean);
      hash.add(results.running_var);
      hash.add(results.mean);
      hash.add(results.invstd);
      std::printf("%s %lldx%lldx%lld %s%s %016llx\n", name, static_cast<long long>(shape.n),
                  static_cast<long long>(shape.c), static_cast<long long>(shape.l), training ? "train" : "eval",
                  kRelu[mode / 2], hash.value());
      if (!training) continue;
      const auto shared = SharedRun<T>(problem, {shape.n / 3, shape.n - shape.n / 3}, table, 2).run();
      Hash of_shares;
      of_shares.add(shared.output);
      of_shares.add(shared.grad_input);
      of_shares.add(shared.running_mean[0]);
      of_shares.add(shared.running_var[0]);
      std::printf("%s %lldx%lldx%lld in two processes%s %016llx\n", name, static_cast<long long>(shape.n),
                  static_cast<long long>(shape.c), static_cast<long long>(shape.l), kRelu[mode / 2],
                  of_shares.value());
    }
}

}  // namespace
}  // namespace torch_bn::testing

// digest [ISA]: of the named instruction set, or of the one in use.
int main(int argc, char** argv) {
  using namespace torch_bn;
  const kernels::KernelTable* table = argc > 1 ? kernels::find_isa(argv[1]) : &kernels::active();
  if (table == nullptr) {
    std::fprintf(stderr, "digest: no instruction set %s here\n", argv[1]);
    return 2;
  }
  testing::print<float>("float32", *table);
  testing::print<double>("float64", *table);
  testing::print<testing::BFloat16Bits>("bfloat16", *table);
  testing::print<testing::Float16Bits>("float16", *table);
  return 0;
}
