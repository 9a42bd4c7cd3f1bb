// Python module xattn_kernels._cuda. Integers in, results out; torch is never linked.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "cuda/probe.h"

namespace {

std::vector<std::string> compiled_archs() {
  std::istringstream words(XATTN_CUDA_ARCHS);
  std::vector<std::string> archs;
  for (std::string word; words >> word;) {
    archs.push_back(word);
  }
  return archs;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  namespace py = pybind11;
  module.doc() = "CUDA kernels of xattn_kernels.";
  module.attr("__version__") = XATTN_VERSION;
  module.def("compiled_archs", &compiled_archs,
             "Architectures in CMake's notation: '90a-real' is machine code, '120' adds PTX.");
  module.def("probe", &xattn::cuda::probe, py::arg("device") = 0, py::call_guard<py::gil_scoped_release>(),
             "Run a one-thread kernel and return the architecture it was compiled for, times ten. "
             "RuntimeError with CUDA's message when the device cannot run it.");
}
