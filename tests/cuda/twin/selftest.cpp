#include "selftest.h"

#include <pybind11/pybind11.h>

#include "bind.h"

namespace py = pybind11;

PYBIND11_MODULE(_selftest, module) {
  module.def(
      "run",
      [](const std::string& name, int64_t a, int64_t b, int64_t d, int64_t number, int64_t works, int threads,
         size_t shared) {
        xattn::cuda::selftest(name, reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b),
                              reinterpret_cast<void*>(d), number, works, threads, shared);
      },
      py::arg("name"), py::kw_only(), py::arg("a") = 0, py::arg("b") = 0, py::arg("d") = 0, py::arg("number") = 0,
      py::arg("works") = 1, py::arg("threads") = 32, py::arg("shared") = 0);
  xattn::cuda::bind_twin(module);
}
