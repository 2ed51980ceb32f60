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

// 16-bit inputs come with parameters of their own type or in float32; the others with their own.
template <template <typename, typename> class Call, typename Args>
void dispatch(const Args& args) {
  const bool mixed = args.param_dtype != args.dtype;
  switch (args.dtype) {
    case DType::f32:
      return Call<Float32, Float32>::run(args);
    case DType::f64:
      return Call<Float64, Float64>::run(args);
    case DType::bf16:
      return mixed ? Call<BFloat16, Float32>::run(args) : Call<BFloat16, BFloat16>::run(args);
    case DType::f16:
      return mixed ? Call<Float16, Float32>::run(args) : Call<Float16, Float16>::run(args);
  }
}

template <typename Element, typename Param>
struct Forward {
  static void run(const ForwardArgs& args) { forward<Element, Param>(args); }
};

template <typename Element, typename Param>
struct Backward {
  static void run(const BackwardArgs& args) { backward<Element, Param>(args); }
};

void run_forward(const ForwardArgs& args) {
  dispatch<Forward>(args);
}
void run_backward(const BackwardArgs& args) {
  dispatch<Backward>(args);
}

}  // namespace

namespace TORCH_BN_ISA {
const KernelTable table = {TORCH_BN_NAME(TORCH_BN_ISA), run_forward, run_backward, &sync_table};
}  // namespace TORCH_BN_ISA

}  // namespace torch_bn::kernels
