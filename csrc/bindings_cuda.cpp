// Python module xattn_kernels._cuda: pointers, strides and edges as integers in, nothing out but errors.
// torch is never linked. Python checks all arguments, allocates all results, and keeps tensors alive.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "cuda/operators.h"
#include "edges.h"
#if defined(XATTN_TWIN)
#include "bind.h"
#else
#include "cuda/probe.h"
#endif

namespace py = pybind11;

namespace xattn {
namespace {

std::vector<std::string> compiled_archs() {
  std::istringstream words(XATTN_CUDA_ARCHS);
  std::vector<std::string> archs;
  for (std::string word; words >> word;) {
    archs.push_back(word);
  }
  return archs;
}

// Device, stream, whether tf32 is allowed, and a function from bytes to the address of device memory.
using Context = std::tuple<int, int64_t, bool, std::function<int64_t(int64_t)>>;

// To be called without the lock of Python's interpreter, which `scratch` takes.
cuda::Call call(const Context& context) {
  const auto& [device, stream, tf32, scratch] = context;
  return {device, reinterpret_cast<cuda::Stream>(stream), tf32,
          [&scratch = scratch](int64_t bytes) { return static_cast<char*>(pointer(scratch(bytes))); }};
}

void linear_forward(const Context& context, int dtype, int64_t batch, int64_t channels, int64_t value_channels,
                    int feature_map, double eps, const Views& queries, const Views& keys, const Views& values,
                    const Views& outputs, const Integers& edges, int64_t initial_s, int64_t initial_z, int64_t state_s,
                    int64_t state_z) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  cuda::linear_forward({Dtype(dtype), batch, channels, value_channels, FeatureMap(feature_map), eps, span(queries),
                        span(keys), span(values), span(outputs), index.list(), pointer(initial_s), pointer(initial_z),
                        pointer(state_s), pointer(state_z)},
                       call(context));
}

void linear_backward(const Context& context, int dtype, int64_t batch, int64_t channels, int64_t value_channels,
                     int feature_map, double eps, const Views& queries, const Views& keys, const Views& values,
                     const Integers& edges, int64_t state_s, int64_t state_z, const Views& grad_outputs,
                     int64_t grad_state_s, int64_t grad_state_z, const Views& grad_queries, const Views& grad_keys,
                     const Views& grad_values, int64_t grad_initial_s, int64_t grad_initial_z) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), grad_outputs.size());
  // The kernels see the outputs only through their gradients, which have the same token counts.
  cuda::linear_backward(
      {Dtype(dtype), batch, channels, value_channels, FeatureMap(feature_map), eps, span(queries), span(keys),
       span(values), span(grad_outputs), index.list(), nullptr, nullptr, pointer(state_s), pointer(state_z)},
      {span(grad_outputs), pointer(grad_state_s), pointer(grad_state_z), span(grad_queries), span(grad_keys),
       span(grad_values), pointer(grad_initial_s), pointer(grad_initial_z)},
      call(context));
}

void softmax_forward(const Context& context, int dtype, int64_t batch, int64_t channels, int64_t value_channels,
                     int64_t heads, double scale, const Views& queries, const Views& keys, const Views& values,
                     const Views& outputs, const Integers& edges, const Integers& lse) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  cuda::softmax_forward({Dtype(dtype), batch, channels, value_channels, heads, scale, span(queries), span(keys),
                         span(values), span(outputs), index.list(), pointers(lse)},
                        call(context));
}

void softmax_backward(const Context& context, int dtype, int64_t batch, int64_t channels, int64_t value_channels,
                      int64_t heads, double scale, const Views& queries, const Views& keys, const Views& values,
                      const Views& outputs, const Integers& edges, const Integers& lse, const Views& grad_outputs,
                      const Integers& grad_lse, const Views& grad_queries, const Views& grad_keys,
                      const Views& grad_values) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  cuda::softmax_backward(
      {Dtype(dtype), batch, channels, value_channels, heads, scale, span(queries), span(keys), span(values),
       span(outputs), index.list(), pointers(lse)},
      {span(grad_outputs), pointers(grad_lse), span(grad_queries), span(grad_keys), span(grad_values)}, call(context));
}

template <auto kKernel>
void run_pyramid(const Context& context, int dtype, int64_t batch, int64_t hidden, int64_t outputs,
                 const Levels& levels, int weight_dtype, const Views& weights, const std::array<int64_t, 5>& classifier,
                 int64_t scale, int64_t shift, int64_t classifier_bias, const std::array<int64_t, 5>& output,
                 int64_t map, int64_t mean, int64_t deviations) {
  kKernel({Dtype(dtype), batch, hidden, outputs, span(levels), pointer(scale), pointer(shift), nullptr,
           pointer(classifier_bias), view(output), pointer(map), pointer(mean), pointer(deviations)},
          {Dtype(weight_dtype), span(weights), view(classifier)}, call(context));
}

void block_forward(const Context& context, int dtype, int64_t batch, int64_t channels, double eps,
                   const Views& features, int64_t packed, int64_t sets, const Integers& edges, const Views& outputs) {
  const EdgeIndex index(edges, 4, features.size(), features.size(), outputs.size());
  cuda::block_forward(
      {Dtype(dtype), batch, channels, eps, span(features), span(outputs), index.list(), pointer(packed)}, sets,
      call(context));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  module.doc() = "CUDA kernels of xattn_kernels; see csrc/problem.h for the arguments.";
  module.attr("__version__") = XATTN_VERSION;
  module.def("compiled_archs", &compiled_archs,
             "Architectures in CMake's notation: '90a-real' is machine code, '120' adds PTX.");
#if defined(XATTN_TWIN)
  module.attr("device_type") = "cpu";
  cuda::bind_twin(module);
#else
  module.attr("device_type") = "cuda";
  module.def("probe", &cuda::probe, py::arg("device") = 0, release(),
             "Run a one-thread kernel and return the architecture it was compiled for, times ten. "
             "RuntimeError with CUDA's message when the device cannot run it.");
#endif
  module.def("linear_forward", &linear_forward, release());
  module.def("linear_backward", &linear_backward, release());
  module.def("softmax_forward", &softmax_forward, release());
  module.def("softmax_backward", &softmax_backward, release());
  module.def("pyramid_forward", &run_pyramid<&cuda::pyramid_forward>, release());
  module.def("pyramid_classify", &run_pyramid<&cuda::pyramid_classify>, release());
  module.def("block_forward", &block_forward, release());
}

}  // namespace xattn
