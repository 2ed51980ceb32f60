/// \file
/// What this library was built as, and what it runs on.
#pragma once

#include <string>
#include <vector>

namespace torch_bn {

/// Facts about the built library and the running processor.
struct BuildInfo {
  std::string version;                      ///< of torch_bn, e.g. "0.1.0"
  std::string torch_version;                ///< the torch it was compiled against, e.g. "2.13.0"
  std::string compiler;                     ///< e.g. "GNU 12.2.0"
  int openmp;                               ///< value of _OPENMP, a date as yyyymm
  std::vector<std::string> isas_built;      ///< instruction sets with kernels, weakest first
  std::vector<std::string> isas_supported;  ///< those of them that this processor runs
  std::string isa;                          ///< the one in use
};

/// The facts of this library.
///
/// ```cpp
/// assert(!torch_bn::build_info().isa.empty());
/// ```
///
/// \throws c10::Error when the environment variable TORCH_BN_ISA holds an unknown name, or one that this
///   processor lacks; the message lists the valid ones.
BuildInfo build_info();

}  // namespace torch_bn
