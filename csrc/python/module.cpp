// The extension module torch_bn._C. Importing it loads libtorch_bn, which registers the operators; it shares
// no pybind11 type with torch's own bindings.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch_bn/build_info.h>

#include <stdexcept>

#include "layer.h"

namespace py = pybind11;

namespace {

PyMethodDef fast_methods[] = {
    {"layer_forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(torch_bn::python::layer_forward)),
     METH_FASTCALL, "The layer's forward for the usual arguments; NotImplemented for others."},
    {nullptr, nullptr, 0, nullptr}};

// Without the C++ frames that pybind11 would show.
torch_bn::BuildInfo usable_build_info() {
  try {
    return torch_bn::build_info();
  } catch (const c10::Error& error) {
    throw std::runtime_error(error.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the C++ library of torch_bn and tells what it was built as.";
  if (PyModule_AddFunctions(m.ptr(), fast_methods) != 0) throw py::error_already_set();
  m.def(
      "build_info",
      [] {
        const auto info = usable_build_info();
        py::dict result;
        result["version"] = info.version;
        result["torch_version"] = info.torch_version;
        result["compiler"] = info.compiler;
        result["openmp"] = info.openmp;
        result["isas_built"] = info.isas_built;
        result["isas_supported"] = info.isas_supported;
        result["isa"] = info.isa;
        return result;
      },
      "Facts about the built library as a dict; raises RuntimeError when TORCH_BN_ISA is not usable here.");
}
