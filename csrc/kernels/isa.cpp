// The kernels of one instruction set. Compiled once for each, with that set's flags and with TORCH_BN_ISA
// naming it; everything included has internal linkage, so no other set's code can be picked in its place.
#include "isa.h"

#include "backward.h"
#include "forward.h"
#include "sync.h"

#define TORCH_BN_STRING(x) #x
#define TORCH_BN_NAME(x) TORCH_BN_STRING(x)

namespace torch_bn::kernels {
namespace {

struct Forward {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const ForwardArgs& args) {
    forward<Element, Param, kRelu>(args);
  }
};

struct Backward {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const BackwardArgs& args) {
    backward<Element, Param, kRelu>(args);
  }
};

}  // namespace

namespace TORCH_BN_ISA {
const KernelTable table = {TORCH_BN_NAME(TORCH_BN_ISA), dispatch<Forward, ForwardArgs>,
                           dispatch<Backward, BackwardArgs>, &sync_table};
}  // namespace TORCH_BN_ISA

}  // namespace torch_bn::kernels
