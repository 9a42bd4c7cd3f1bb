#include "bind.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <set>
#include <stdexcept>

#include "control.h"

namespace xattn::cuda {
namespace {

namespace py = pybind11;

void configure(uint64_t seed, int processors, int shared_bytes, int capability) {
  twin::Settings settings;
  settings.seed = seed;
  settings.processors = processors;
  settings.shared_bytes = shared_bytes;
  settings.capability = capability;
  twin::configure(settings);
}

void drop(const std::string& kind, const std::string& file, int line) {
  static const std::set<std::string> kinds{"barrier", "warp", "wait", "some", "fence", "phase", "product"};
  if (kinds.count(kind) == 0) throw std::runtime_error("twin_drop: there is no kind '" + kind + "'");
  twin::Settings settings = twin::configuration();
  settings.drop_kind = kind;
  settings.drop_file = file;
  settings.drop_line = line;
  twin::configure(settings);
}

py::list places() {
  py::list list;
  for (const twin::Place& place : twin::recorded().places) {
    list.append(py::make_tuple(place.kind, place.file, place.line, place.count));
  }
  return list;
}

py::list launches() {
  py::list list;
  for (const twin::Launch& launch : twin::recorded().launches) {
    list.append(py::make_tuple(launch.name, launch.blocks, launch.threads, launch.shared));
  }
  return list;
}

py::list counts() {
  py::list list;
  for (const twin::Launch& launch : twin::recorded().launches) {
    py::dict counts;
    counts["name"] = launch.name;
    counts["products"] = launch.products;
    counts["loads"] = launch.loads;
    counts["conflicts"] = launch.conflicts;
    counts["shuffles"] = launch.shuffles;
    counts["copied_bytes"] = launch.copied_bytes;
    list.append(counts);
  }
  return list;
}

}  // namespace

void bind_twin(py::module_& module) {
  module.def("twin_configure", &configure, py::kw_only(), py::arg("seed") = 0, py::arg("processors") = 4,
             py::arg("shared_bytes") = 232448, py::arg("capability") = 90,
             "Settings of the launches to come: the order of threads, blocks and copies follows from the seed and "
             "the number of the launch. Ends twin_drop; twin_places and twin_launches start anew.");
  module.def("twin_drop", &drop, py::arg("kind"), py::arg("file"), py::arg("line"),
             "The call of sync_threads ('barrier'), sync_warp ('warp') or wait_copies ('wait') at this line of the "
             "file whose name ends so does nothing, until twin_configure is called. Of sm90.h: sync_some ('some'), "
             "fence_async ('fence'), wait_phase ('phase'), wait_products ('product').");
  module.def("twin_places", &places, "(kind, file, line, count) of all calls that twin_drop could name.");
  module.def("twin_launches", &launches, "(kernel, blocks, threads, bytes of shared memory) of all launches.");
  module.def("twin_counts", &counts,
             "What the warps of every launch did: products of mma's size, load_matrices and how many times more than "
             "once conflicts of banks let each of its four matrices take, shuffles and votes, bytes of copy_async.");
}

}  // namespace xattn::cuda
