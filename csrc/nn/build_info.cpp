#include <c10/util/Exception.h>
#include <omp.h>
#include <torch/version.h>
#include <torch_bn/build_info.h>

#include <stdexcept>

#include "../kernels/dispatch.h"

namespace torch_bn {

BuildInfo build_info() {
  BuildInfo info;
  info.version = TORCH_BN_VERSION;
  info.torch_version = TORCH_VERSION;
  info.compiler = TORCH_BN_COMPILER;
  info.openmp = _OPENMP;
  info.isas_built = kernels::built_isas();
  info.isas_supported = kernels::supported_isas();
  try {
    info.isa = kernels::active().isa;
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(false, error.what());
  }
  return info;
}

}  // namespace torch_bn
