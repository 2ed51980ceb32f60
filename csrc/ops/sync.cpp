// The schemas of the synchronised layer, entry points through the dispatcher, shapes without data, and the
// collectives.
#include "sync.h"

#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/library.h>

#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

#include "checks.h"
#include "plain.h"

namespace torch_bn::ops::sync {

TORCH_LIBRARY_FRAGMENT(torch_bn, m) {
  m.def(
      "sync_batch_norm(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str group, "
      "int processes, str layer, bool agree, int relu=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("_sync_moments(Tensor input, int mark, int relu=0) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def(
      "_sync_normalise(Tensor input, Tensor parts, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str layer, int "
      "relu=0) "
      "-> (Tensor output, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_sync_gradient_sums(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, int "
      "mark, "
      "int relu=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_sync_gradient(Tensor grad_output, Tensor input, Tensor? weight, Tensor? bias, Tensor stats, Tensor parts, "
      "str layer, int relu=0) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

namespace {

template <typename Function>
c10::TypedOperatorHandle<Function> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

// Whether somebody records the operators that are called, instead of having the numbers made.
bool is_traced(const at::Tensor& tensor) {
  return !is_plain(tensor) || c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// In torch's functional collectives, which are operators. Not every backend has what they ask for: MPI has not.
at::Tensor gather_for_trace(const at::Tensor& part, int64_t processes, std::string group) {
  static const auto gather =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_gather_into_tensor", "");
  static const auto wait = find<at::Tensor(const at::Tensor&)>("_c10d_functional::wait_tensor");
  // Boxed, because the schema takes a group by its name or itself.
  c10::Stack stack{part, processes, std::move(group)};
  gather.callBoxed(stack);
  return wait.call(stack.front().toTensor());
}

// The backend's thread keeps a copy of this thread's state for some time after the collective has returned, in a
// backward with an object of Python in it. If that is the last to hold it when Python ends, the process is
// aborted.
class WithoutPythonObjects {
 public:
  WithoutPythonObjects() { Objects::set_state({}); }
  ~WithoutPythonObjects() { Objects::set_state(std::move(objects_)); }
  WithoutPythonObjects(const WithoutPythonObjects&) = delete;
  WithoutPythonObjects& operator=(const WithoutPythonObjects&) = delete;

 private:
  using Objects = at::impl::ThreadLocalPythonObjects;
  Objects objects_ = Objects::get_state();
};

at::Tensor gather_now(const at::Tensor& part, int64_t processes, const std::string& group) {
  at::Tensor input = part;
  at::Tensor output = at::empty({processes * part.numel()}, part.options());
  const WithoutPythonObjects guard;
  c10d::resolve_process_group(group)->all_gather_single(output, input)->wait();
  return output;
}

}  // namespace

at::Tensor all_gather(const at::Tensor& part, int64_t processes, c10::string_view group, c10::string_view layer,
                      const char* direction) {
  std::string why;
  try {
    const at::Tensor parts = is_traced(part) ? gather_for_trace(part, processes, std::string(group))
                                             : gather_now(part, processes, std::string(group));
    return parts.view_symint({processes, part.sym_numel()});
  } catch (const c10::Error& error) {
    why = error.what_without_backtrace();
  } catch (const std::exception& error) {
    why = error.what();
  }
  TORCH_CHECK(false, name_of(layer), ": the all-gather of its ", direction, " in group '", group,
              "' failed. Another process may have ended, hang, or be at another place of the program; "
              "TORCH_BN_SYNC_DEBUG=1 tells more. ",
              why);
}

at::Tensor moments(const at::Tensor& input, int64_t mark, int64_t relu) {
  static const auto op = find<decltype(moments)>("torch_bn::_sync_moments");
  return op.call(input, mark, relu);
}

OutputAndStats normalise(const at::Tensor& input, const at::Tensor& parts, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                         const std::optional<at::Tensor>& running_var,
                         const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                         double eps, c10::string_view layer, int64_t relu) {
  static const auto op = find<decltype(normalise)>("torch_bn::_sync_normalise");
  return op.call(input, parts, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, layer,
                 relu);
}

at::Tensor gradient_sums(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& stats, int64_t mark, int64_t relu) {
  static const auto op = find<decltype(gradient_sums)>("torch_bn::_sync_gradient_sums");
  return op.call(grad_output, input, weight, bias, stats, mark, relu);
}

at::Tensor gradient(const at::Tensor& grad_output, const at::Tensor& input,
                    const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                    const at::Tensor& stats, const at::Tensor& parts, c10::string_view layer, int64_t relu) {
  static const auto op = find<decltype(gradient)>("torch_bn::_sync_gradient");
  return op.call(grad_output, input, weight, bias, stats, parts, layer, relu);
}

at::Tensor batch_norm(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                      const std::optional<at::Tensor>& running_var,
                      const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum,
                      double eps, c10::string_view group, int64_t processes, c10::string_view layer, bool agree,
                      int64_t relu) {
  static const auto op = find<decltype(batch_norm)>("torch_bn::sync_batch_norm");
  return op.call(input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, group,
                 processes, layer, agree, relu);
}

namespace {

at::Tensor moments_meta(const at::Tensor& input, int64_t /*mark*/, int64_t /*relu*/) {
  check_forward_but_rows(input, {}, {}, {}, {}, {}, /*training=*/true, /*eps=*/1.0);
  return at::empty_symint({2 + 2 * input.sym_size(1)}, input.options().dtype(at::kDouble));
}

OutputAndStats normalise_meta(const at::Tensor& input, const at::Tensor& /*parts*/,
                              const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& running_mean,
                              const std::optional<at::Tensor>& running_var,
                              const std::optional<at::Tensor>& num_batches_tracked,
                              std::optional<double> /*momentum*/, double eps, c10::string_view /*layer*/,
                              int64_t /*relu*/) {
  check_forward_but_rows(input, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true,
                         eps);
  return {at::empty_symint(input.sym_sizes(), input.options()),
          at::empty_symint({2 * input.sym_size(1) + 1}, input.options().dtype(at::kDouble))};
}

at::Tensor gradient_sums_meta(const at::Tensor& /*grad_output*/, const at::Tensor& input,
                              const std::optional<at::Tensor>& /*weight*/,
                              const std::optional<at::Tensor>& /*bias*/, const at::Tensor& /*stats*/,
                              int64_t /*mark*/, int64_t /*relu*/) {
  return at::empty_symint({2 + 2 * input.sym_size(1)}, input.options().dtype(at::kDouble));
}

at::Tensor gradient_meta(const at::Tensor& /*grad_output*/, const at::Tensor& input,
                         const std::optional<at::Tensor>& /*weight*/, const std::optional<at::Tensor>& /*bias*/,
                         const at::Tensor& /*stats*/, const at::Tensor& /*parts*/, c10::string_view /*layer*/,
                         int64_t /*relu*/) {
  return at::empty_symint(input.sym_sizes(), input.options());
}

TORCH_LIBRARY_IMPL(torch_bn, Meta, m) {
  m.impl("_sync_moments", moments_meta);
  m.impl("_sync_normalise", normalise_meta);
  m.impl("_sync_gradient_sums", gradient_sums_meta);
  m.impl("_sync_gradient", gradient_meta);
}

}  // namespace
}  // namespace torch_bn::ops::sync
