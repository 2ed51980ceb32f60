// The layer's forward in one call from Python.
#pragma once

#include <Python.h>

namespace torch_bn::python {

// layer_forward(input, parameters, buffers, training, track_running_stats, momentum, eps, relu): what the
// layer computes, for the usual arguments (relu: the number of an ops::Relu); NotImplemented for all others, which
// are left to the layer's Python side. Vectorcall convention, METH_FASTCALL.
PyObject* layer_forward(PyObject* module, PyObject* const* arguments, Py_ssize_t count);

}  // namespace torch_bn::python
