#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "blocks.h"
#include "isa.h"

namespace torch_bn::kernels {

std::size_t forward_scratch(const Shape& shape) {
  const Partition partition(shape);
  return static_cast<std::size_t>((kForwardPartials * partition.segments + kForwardCoefficients) *
                                  partition.channels);
}

std::size_t backward_scratch(const Shape& shape) {
  const Partition partition(shape);
  return static_cast<std::size_t>((kBackwardPartials * partition.segments + kBackwardCoefficients) *
                                  partition.channels);
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
    const bool has_avx2 = __builtin_cpu_supports("avx2");
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
      if (name == value)
        return {nullptr, "TORCH_BN_ISA=" + name + ": this processor lacks that instruction set; it has " +
                             joined(supported_isas())};
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
