// From a call's types and its ReLU to the instance of a kernel for them.
#pragma once

#include "element.h"

namespace torch_bn::kernels {
namespace {

// Calls Call::run<Element, Param, Relu>(args, more...).
template <typename Call, typename Element, typename Param, typename Args, typename... More>
void with_relu(const Args& args, More... more) {
  switch (args.relu) {
    case Relu::none:
      return Call::template run<Element, Param, Relu::none>(args, more...);
    case Relu::after:
      return Call::template run<Element, Param, Relu::after>(args, more...);
    case Relu::before:
      return Call::template run<Element, Param, Relu::before>(args, more...);
  }
}

// 16-bit inputs come with parameters of their own type or in float32; the others with their own.
template <typename Call, typename Args, typename... More>
void dispatch(const Args& args, More... more) {
  const bool mixed = args.param_dtype != args.dtype;
  switch (args.dtype) {
    case DType::f32:
      return with_relu<Call, Float32, Float32>(args, more...);
    case DType::f64:
      return with_relu<Call, Float64, Float64>(args, more...);
    case DType::bf16:
      return mixed ? with_relu<Call, BFloat16, Float32>(args, more...)
                   : with_relu<Call, BFloat16, BFloat16>(args, more...);
    case DType::f16:
      return mixed ? with_relu<Call, Float16, Float32>(args, more...)
                   : with_relu<Call, Float16, Float16>(args, more...);
  }
}

}  // namespace
}  // namespace torch_bn::kernels
