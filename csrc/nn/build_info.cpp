#include <omp.h>
#include <torch/version.h>
#include <torch_bn/build_info.h>

#include "../ops/kernel_args.h"

namespace torch_bn {

BuildInfo build_info() {
  BuildInfo info;
  info.version = TORCH_BN_VERSION;
  info.torch_version = TORCH_VERSION;
  info.compiler = TORCH_BN_COMPILER;
  info.openmp = _OPENMP;
  info.isas_built = kernels::built_isas();
  info.isas_supported = kernels::supported_isas();
  info.isa = ops::active_kernels().isa;
  return info;
}

}  // namespace torch_bn
