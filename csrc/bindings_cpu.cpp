// Python module _core: pointers, strides and edges as integers in, nothing out but errors.
//
// The interface of every function is the plain struct it fills (problem.h). Python checks all
// arguments, allocates all results, and keeps the tensors alive during the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/dispatch.h"
#include "edges.h"

namespace py = pybind11;

namespace xattn {
namespace {

void linear_forward(int dtype, int64_t batch, int64_t channels, int64_t value_channels, int feature_map, double eps,
                    const Views& queries, const Views& keys, const Views& values, const Views& outputs,
                    const Integers& edges, int64_t initial_s, int64_t initial_z, int64_t state_s, int64_t state_z,
                    int threads) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  py::gil_scoped_release release;
  kernels().linear_forward({Dtype(dtype), batch, channels, value_channels, FeatureMap(feature_map), eps, span(queries),
                            span(keys), span(values), span(outputs), index.list(), pointer(initial_s),
                            pointer(initial_z), pointer(state_s), pointer(state_z)},
                           threads);
}

void linear_backward(int dtype, int64_t batch, int64_t channels, int64_t value_channels, int feature_map, double eps,
                     const Views& queries, const Views& keys, const Views& values, const Integers& edges,
                     int64_t state_s, int64_t state_z, const Views& grad_outputs, int64_t grad_state_s,
                     int64_t grad_state_z, const Views& grad_queries, const Views& grad_keys, const Views& grad_values,
                     int64_t grad_initial_s, int64_t grad_initial_z, int threads) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), grad_outputs.size());
  py::gil_scoped_release release;
  // The kernel sees the outputs only through their gradients, which have the same token counts.
  kernels().linear_backward(
      {Dtype(dtype), batch, channels, value_channels, FeatureMap(feature_map), eps, span(queries), span(keys),
       span(values), span(grad_outputs), index.list(), nullptr, nullptr, pointer(state_s), pointer(state_z)},
      {span(grad_outputs), pointer(grad_state_s), pointer(grad_state_z), span(grad_queries), span(grad_keys),
       span(grad_values), pointer(grad_initial_s), pointer(grad_initial_z)},
      threads);
}

void softmax_forward(int dtype, int64_t batch, int64_t channels, int64_t value_channels, int64_t heads, double scale,
                     const Views& queries, const Views& keys, const Views& values, const Views& outputs,
                     const Integers& edges, const Integers& lse, int threads) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  py::gil_scoped_release release;
  kernels().softmax_forward({Dtype(dtype), batch, channels, value_channels, heads, scale, span(queries), span(keys),
                             span(values), span(outputs), index.list(), pointers(lse)},
                            threads);
}

void softmax_backward(int dtype, int64_t batch, int64_t channels, int64_t value_channels, int64_t heads, double scale,
                      const Views& queries, const Views& keys, const Views& values, const Views& outputs,
                      const Integers& edges, const Integers& lse, const Views& grad_outputs, const Integers& grad_lse,
                      const Views& grad_queries, const Views& grad_keys, const Views& grad_values, int threads) {
  const EdgeIndex index(edges, 3, queries.size(), keys.size(), outputs.size());
  py::gil_scoped_release release;
  kernels().softmax_backward(
      {Dtype(dtype), batch, channels, value_channels, heads, scale, span(queries), span(keys), span(values),
       span(outputs), index.list(), pointers(lse)},
      {span(grad_outputs), pointers(grad_lse), span(grad_queries), span(grad_keys), span(grad_values)}, threads);
}

void block_pack(int dtype, int64_t channels, const FoldedLayers& layers, double eps, int64_t packed, int threads) {
  py::gil_scoped_release release;
  kernels().block_pack(Dtype(dtype), channels, layers_of(layers), eps, pointer(packed), threads);
}

void block_forward(int dtype, int64_t batch, int64_t channels, double eps, const Views& features, int64_t packed,
                   const Integers& edges, const Views& outputs, int threads) {
  const EdgeIndex index(edges, 4, features.size(), features.size(), outputs.size());
  bool right_layout;
  {
    py::gil_scoped_release release;
    right_layout = kernels().block_forward(
        {Dtype(dtype), batch, channels, eps, span(features), span(outputs), index.list(), pointer(packed)}, threads);
  }
  if (!right_layout)
    throw std::runtime_error("packed: its layout is not that of this dtype and instruction set (" + instruction_set() +
                             "); pack the weights again");
}

template <auto kKernel>
void run_pyramid(int dtype, int64_t batch, int64_t hidden, int64_t outputs, const Levels& levels, int64_t scale,
                 int64_t shift, int64_t classifier, int64_t classifier_bias, const std::array<int64_t, 5>& output,
                 int64_t map, int64_t mean, int64_t deviations, int threads) {
  py::gil_scoped_release release;
  (kernels().*kKernel)(
      {Dtype(dtype), batch, hidden, outputs, span(levels), pointer(scale), pointer(shift), pointer(classifier),
       pointer(classifier_bias), view(output), pointer(map), pointer(mean), pointer(deviations)},
      threads);
}

template <auto kKernel>
void run_pyramid_backward(int dtype, int64_t batch, int64_t hidden, int64_t outputs, const Levels& levels,
                          int64_t scale, int64_t shift, int64_t classifier, int64_t map,
                          const std::array<int64_t, 5>& grad_output, int64_t mean, int64_t slope, int64_t offset,
                          int64_t sums, int64_t map_sums, int64_t grad_classifier, const Views& grad_x,
                          const Integers& grad_weights, int threads) {
  py::gil_scoped_release release;
  (kernels().*kKernel)({Dtype(dtype),
                        batch,
                        hidden,
                        outputs,
                        span(levels),
                        pointer(scale),
                        pointer(shift),
                        pointer(classifier),
                        nullptr,
                        {},
                        pointer(map),
                        nullptr,
                        nullptr},
                       {view(grad_output), pointer(mean), pointer(slope), pointer(offset), pointer(sums),
                        pointer(map_sums), pointer(grad_classifier), span(grad_x), pointers(grad_weights)},
                       threads);
}

// center, first, first_affine, second, affine, state_s, state_z, coefficients, precise; 0 for what a pass does not
// take.
using Operands = std::array<int64_t, 9>;
// mean, deviations, state_s, state_z, sums, second, first, bias.
using Results = std::array<int64_t, 8>;

template <auto kKernel>
void run_training(int dtype, int64_t batch, int64_t channels, double eps, const Views& features, const Integers& slots,
                  const Integers& pair_of_output, const Operands& x, const Views& maps, const Views& grad_features,
                  const Results& y, int threads) {
  const GroupIndex pairs(slots, features.size()), outputs(pair_of_output, slots.size());
  py::gil_scoped_release release;
  (kernels().*kKernel)({Dtype(dtype), batch, channels, eps, span(features), pointer(x[0]), pairs.groups(),
                        pointer(x[1]), pointer(x[2]), pointer(x[3]), pointer(x[4]), outputs.groups(), pointer(x[5]),
                        pointer(x[6]), span(maps), pointer(x[7]), pointer(x[8]), span(grad_features)},
                       {pointer(y[0]), pointer(y[1]), pointer(y[2]), pointer(y[3]), pointer(y[4]), pointer(y[5]),
                        pointer(y[6]), pointer(y[7])},
                       threads);
}

py::dict cpu_info() {
  py::dict info;
  info["isa"] = instruction_set();
  info["available"] = available_instruction_sets();
  info["compiled"] = compiled_instruction_sets();
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Native CPU kernels of xattn_kernels; see csrc/problem.h for the arguments.";
  if (const char* name = std::getenv("XATTN_CPU_ISA"); name != nullptr && *name != '\0') {
    try {
      set_instruction_set(name);
    } catch (const std::invalid_argument& error) {
      throw py::import_error(std::string("XATTN_CPU_ISA: ") + error.what());
    }
  }
  module.def("cpu_info", &cpu_info);
  module.def("set_isa", &set_instruction_set, py::arg("name"));
  module.def("linear_forward", &linear_forward);
  module.def("linear_backward", &linear_backward);
  module.def("softmax_forward", &softmax_forward);
  module.def("softmax_backward", &softmax_backward);
  module.def("block_packed_bytes", [](int dtype, int64_t channels, int64_t weights) {
    return kernels().block_packed_bytes(Dtype(dtype), channels, weights);
  });
  module.def("block_pack", &block_pack);
  module.def("block_forward", &block_forward);
  module.def("pyramid_forward", &run_pyramid<&Kernels::pyramid_forward>);
  module.def("pyramid_classify", &run_pyramid<&Kernels::pyramid_classify>);
  module.def("pyramid_sums", &run_pyramid_backward<&Kernels::pyramid_sums>);
  module.def("pyramid_backward", &run_pyramid_backward<&Kernels::pyramid_backward>);
  module.def("training_moments", &run_training<&Kernels::training_moments>);
  module.def("training_first_moments", &run_training<&Kernels::training_first_moments>);
  module.def("training_hidden_moments", &run_training<&Kernels::training_hidden_moments>);
  module.def("training_states", &run_training<&Kernels::training_states>);
  module.def("training_attend", &run_training<&Kernels::training_attend>);
  module.def("training_target_sums", &run_training<&Kernels::training_target_sums>);
  module.def("training_target_gradients", &run_training<&Kernels::training_target_gradients>);
  module.def("training_source_sums", &run_training<&Kernels::training_source_sums>);
  module.def("training_source_gradients", &run_training<&Kernels::training_source_gradients>);
  module.def("training_input_gradient", &run_training<&Kernels::training_input_gradient>);
}

}  // namespace xattn
