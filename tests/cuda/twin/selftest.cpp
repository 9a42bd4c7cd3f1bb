#include "selftest.h"

#include <pybind11/pybind11.h>

#include "bind.h"

PYBIND11_MODULE(_selftest, module) {
  module.def("run", [](const std::string& name, int64_t a, int64_t b, int64_t d, int64_t number) {
    xattn::cuda::selftest(name, reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(b),
                          reinterpret_cast<float*>(d), number);
  });
  xattn::cuda::bind_twin(module);
}
