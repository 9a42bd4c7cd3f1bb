#pragma once

namespace pybind11 {
class module_;
}

namespace xattn::cuda {

// Adds what tests ask of the layer itself: twin_configure, twin_drop, twin_places, twin_launches.
void bind_twin(pybind11::module_& module);

}  // namespace xattn::cuda
