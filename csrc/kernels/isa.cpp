// The kernels of one instruction set. Compiled once for each, with that set's flags and with TORCH_BN_ISA
// naming it; everything included has internal linkage, so no other set's code can be picked in its place.
#include "isa.h"

#include "backward.h"
#include "forward.h"

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

template <typename Call, typename Element, typename Param, typename Args>
void with_relu(const Args& args) {
  switch (args.relu) {
    case Relu::none:
      return Call::template run<Element, Param, Relu::none>(args);
    case Relu::after:
      return Call::template run<Element, Param, Relu::after>(args);
    case Relu::before:
      return Call::template run<Element, Param, Relu::before>(args);
  }
}

// 16-bit inputs come with parameters of their own type or in float32; the others with their own.
template <typename Call, typename Args>
void dispatch(const Args& args) {
  const bool mixed = args.param_dtype != args.dtype;
  switch (args.dtype) {
    case DType::f32:
      return with_relu<Call, Float32, Float32>(args);
    case DType::f64:
      return with_relu<Call, Float64, Float64>(args);
    case DType::bf16:
      return mixed ? with_relu<Call, BFloat16, Float32>(args) : with_relu<Call, BFloat16, BFloat16>(args);
    case DType::f16:
      return mixed ? with_relu<Call, Float16, Float32>(args) : with_relu<Call, Float16, Float16>(args);
  }
}

}  // namespace

namespace TORCH_BN_ISA {
const KernelTable table = {TORCH_BN_NAME(TORCH_BN_ISA), dispatch<Forward, ForwardArgs>,
                           dispatch<Backward, BackwardArgs>};
}  // namespace TORCH_BN_ISA

}  // namespace torch_bn::kernels
