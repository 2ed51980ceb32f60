// Reading five tensors off a module and calling the operator by name costs Python several times what the
// operator takes on a small batch. Here it is one call, on torch's own types and with no type caster.
#include "layer.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "../ops/ops.h"

namespace torch_bn::python {
namespace {

// A name for dictionary lookups, made once.
PyObject* interned(const char* name) {
  return PyUnicode_InternFromString(name);
}

// An entry that is None or exactly a torch.Tensor or Parameter; false for anything else or none at all.
bool tensor_entry(PyObject* dict, PyObject* name, std::optional<at::Tensor>& tensor) {
  PyObject* entry = PyDict_GetItemWithError(dict, name);
  if (entry == nullptr) return false;
  if (Py_IsNone(entry)) return true;
  if (!THPVariable_CheckExact(entry)) return false;
  tensor = THPVariable_Unpack(entry);
  return true;
}

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

}  // namespace

PyObject* layer_forward(PyObject* /*module*/, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  static PyObject* const kWeight = interned("weight");
  static PyObject* const kBias = interned("bias");
  static PyObject* const kRunningMean = interned("running_mean");
  static PyObject* const kRunningVar = interned("running_var");
  static PyObject* const kCounter = interned("num_batches_tracked");
  TORCH_CHECK_TYPE(count == 8, "layer_forward expects 8 arguments, got ", count);
  PyObject* const input = arguments[0];
  PyObject* const parameters = arguments[1];
  PyObject* const buffers = arguments[2];
  PyObject* const momentum = arguments[5];
  PyObject* const eps = arguments[6];
  const long relu = PyLong_AsLong(arguments[7]);
  if (relu == -1 && PyErr_Occurred() != nullptr) return nullptr;
  const bool usual = relu >= 0 && relu <= 2 && THPVariable_CheckExact(input) && PyDict_CheckExact(parameters) &&
                     PyDict_CheckExact(buffers) && PyBool_Check(arguments[3]) && PyBool_Check(arguments[4]) &&
                     PyFloat_CheckExact(eps) && (Py_IsNone(momentum) || PyFloat_CheckExact(momentum)) &&
                     !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing();
  if (!usual) Py_RETURN_NOTIMPLEMENTED;

  const at::Tensor& x = THPVariable_Unpack(input);
  if (!x.is_cpu() || x.dim() < 2 || x.dim() > 3) Py_RETURN_NOTIMPLEMENTED;
  std::optional<at::Tensor> weight;
  std::optional<at::Tensor> bias;
  std::optional<at::Tensor> running_mean;
  std::optional<at::Tensor> running_var;
  std::optional<at::Tensor> counter;
  if (!tensor_entry(parameters, kWeight, weight) || !tensor_entry(parameters, kBias, bias) ||
      !tensor_entry(buffers, kRunningMean, running_mean) || !tensor_entry(buffers, kRunningVar, running_var) ||
      !tensor_entry(buffers, kCounter, counter)) {
    if (PyErr_Occurred() != nullptr) return nullptr;
    Py_RETURN_NOTIMPLEMENTED;
  }
  // In training without tracking the statistics are left alone; in evaluation without them the batch's own
  // are used. Both as in torch.
  const bool training = Py_IsTrue(arguments[3]) != 0;
  const bool tracks = Py_IsTrue(arguments[4]) != 0;
  if (training && !tracks) running_mean = running_var = std::nullopt;
  if (!training || !tracks) counter = std::nullopt;
  const bool by_batch = training || (!running_mean.has_value() && !running_var.has_value());
  const std::optional<double> factor =
      Py_IsNone(momentum) ? std::nullopt : std::optional<double>(PyFloat_AS_DOUBLE(momentum));
  at::Tensor output;
  {
    const WithoutGil released;
    output = ops::batch_norm(static_cast<ops::Relu>(relu), x, weight, bias, running_mean, running_var, counter,
                             by_batch, factor, PyFloat_AS_DOUBLE(eps));
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

}  // namespace torch_bn::python
