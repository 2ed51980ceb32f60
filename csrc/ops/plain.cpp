#include "plain.h"

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

namespace torch_bn::ops {
namespace {

// Whether the gradient that the engine handed to a Function's backward is dead after it. The Function holds the
// one reference; whoever else may read the gradient (its user, a hook, `retain_grad`, another node) holds one
// more, and a view of it another of the storage. Memory that is not torch's own, such as an array of NumPy's, may
// have owners that no count tells of.
bool is_last_use(const at::Tensor& grad) {
  return grad.use_count() == 1 && grad.has_storage() && grad.storage().use_count() == 1 &&
         grad.storage().data_ptr().get_deleter() == c10::GetCPUAllocator()->raw_deleter();
}

}  // namespace

bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  return tensor.layout() == at::kStrided && (tensor.key_set() | kPlain) == kPlain;
}
bool is_plain(const std::optional<at::Tensor>& tensor) {
  return !is_given(tensor) || is_plain(*tensor);
}

bool nobody_looks_on() {
  constexpr c10::DispatchKeySet kUsual({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_ - kUsual).empty() &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set();
}

bool autograd_is_active() {
  return !c10::impl::tls_local_dispatch_key_set().excluded_.has(c10::DispatchKey::AutogradCPU);
}

bool may_overwrite(const at::Tensor& grad, const at::Tensor& input) {
  return is_last_use(grad) && grad.is_contiguous() && grad.scalar_type() == input.scalar_type() &&
         grad.sizes() == input.sizes() && !grad.storage().is_alias_of(input.storage());
}

}  // namespace torch_bn::ops
