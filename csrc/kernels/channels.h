// Reading and writing the per-channel arguments, which come in the parameters' own type and stride.
#pragma once

#include "element.h"

namespace torch_bn::kernels {
namespace {

template <typename Element>
double read_channel(const ChannelView& view, i64 c, double otherwise) {
  if (view.data == nullptr) return otherwise;
  return Element::load(static_cast<const typename Element::Storage*>(view.data)[c * view.stride]);
}

template <typename Element>
void write_channel(void* data, i64 index, double value) {
  static_cast<typename Element::Storage*>(data)[index] = Element::store(value);
}

}  // namespace
}  // namespace torch_bn::kernels
