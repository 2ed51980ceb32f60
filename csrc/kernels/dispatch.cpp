#include "dispatch.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "blocks.h"
#include "isa.h"

namespace torch_bn::kernels {

namespace {

// The layout decides the order of the sums, and with it the number of segments: room for the larger one.
std::size_t scratch_doubles(const Shape& shape, i64 partials, i64 coefficients) {
  const i64 segments = max_of(Partition(shape, false).segments, Partition(shape, true).segments);
  return static_cast<std::size_t>((partials * segments + coefficients) * shape.c + kAlignmentRoom);
}

}  // namespace

std::size_t forward_scratch(const Shape& shape) {
  return scratch_doubles(shape, kForwardPartials, kForwardCoefficients);
}

std::size_t backward_scratch(const Shape& shape) {
  return scratch_doubles(shape, kBackwardPartials, kBackwardCoefficients);
}

namespace {

struct Candidate {
  const KernelTable* table;
  bool supported;
};

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> all = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return std::vector<Candidate>{
        {&baseline::table, true}, {&avx2::table, has_avx2}, {&avx512::table, has_avx512}};
#elif defined(__aarch64__)
    return std::vector<Candidate>{{&neon::table, true}};
#else
    return std::vector<Candidate>{{&baseline::table, true}};
#endif
  }();
  return all;
}

std::string joined(const std::vector<std::string>& names) {
  std::string list;
  for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
  return list;
}

const KernelTable* strongest() {
  const KernelTable* best = nullptr;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) best = candidate.table;
  return best;
}

// torch's own limit on its vector code; what torch does not know it ignores, and so do we.
const KernelTable* torch_limit() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  if (value == nullptr) return nullptr;
  const std::string name = value;
  if (name == "default") return candidates().front().table;
  return name == "avx2" || name == "avx512" ? find_isa(name) : nullptr;
}

struct Choice {
  const KernelTable* table = nullptr;
  std::string error;
};

Choice choose() {
  if (const char* value = std::getenv("TORCH_BN_ISA"); value != nullptr && *value != '\0') {
    const KernelTable* table = find_isa(value);
    if (table != nullptr) return {table, {}};
    for (const std::string& name : built_isas())
      if (name == value)  // GCOVR_EXCL_START: needs a processor that lacks one of the sets
        return {nullptr, "TORCH_BN_ISA=" + name + ": this processor lacks that instruction set; it has " +
                             joined(supported_isas())};  // GCOVR_EXCL_STOP
    return {nullptr, std::string("TORCH_BN_ISA=") + value + ": unknown instruction set; valid names are " +
                         joined(built_isas())};
  }
  if (const KernelTable* limit = torch_limit()) return {limit, {}};
  return {strongest(), {}};
}

const Choice chosen = choose();

}  // namespace

const KernelTable& active() {
  if (chosen.table == nullptr) throw std::runtime_error(chosen.error);
  return *chosen.table;
}

std::int64_t stream_from() {
  static const std::int64_t bytes = [] {
    std::int64_t kib = 32768;
    // Not from sysconf, which counts every processor of a machine of several.
    std::ifstream("/sys/devices/system/cpu/cpu0/cache/index3/size") >> kib;  // in the form 32768K
    return std::max<std::int64_t>(kib, 4096) * 1024 / 2;
  }();
  return bytes;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.supported) names.emplace_back(candidate.table->isa);
  return names;
}

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates()) names.emplace_back(candidate.table->isa);
  return names;
}

const KernelTable* find_isa(const std::string& name) {
  for (const Candidate& candidate : candidates())
    if (candidate.supported && name == candidate.table->isa) return candidate.table;
  return nullptr;
}

}  // namespace torch_bn::kernels
