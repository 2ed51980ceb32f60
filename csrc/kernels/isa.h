// The tables of the instruction sets that this library was built for.
#pragma once

#include "api.h"

namespace torch_bn::kernels {

#if defined(__x86_64__)
namespace baseline {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#elif defined(__aarch64__)
namespace neon {
extern const KernelTable table;
}
#else
namespace baseline {
extern const KernelTable table;
}
#endif

}  // namespace torch_bn::kernels
