#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace xattn {

#ifdef XATTN_HAVE_AVX512_BF16
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif
#ifdef XATTN_HAVE_AVX512
namespace avx512 {
extern const Kernels kernels;
}
#endif
#ifdef XATTN_HAVE_AVX2
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace portable {
extern const Kernels kernels;
}

namespace {

struct Build {
  const char* name;
  const Kernels* kernels;
  bool (*supported)();
};

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Build builds[] = {
#ifdef XATTN_HAVE_AVX512_BF16
    {"avx512_bf16", &avx512_bf16::kernels, has_avx512_bf16},
#endif
#ifdef XATTN_HAVE_AVX512
    {"avx512", &avx512::kernels, has_avx512},
#endif
#ifdef XATTN_HAVE_AVX2
    {"avx2", &avx2::kernels, has_avx2},
#endif
    {"portable", &portable::kernels, [] { return true; }},
};

const Build* best() {
  for (const Build& build : builds)
    if (build.supported()) return &build;
  return nullptr;  // not reached: portable is always supported
}

std::atomic<const Build*> current{best()};

}  // namespace

std::vector<std::string> compiled_instruction_sets() {
  std::vector<std::string> names;
  for (const Build& build : builds) names.emplace_back(build.name);
  return names;
}

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Build& build : builds)
    if (build.supported()) names.emplace_back(build.name);
  return names;
}

std::string instruction_set() { return current.load()->name; }

void set_instruction_set(const std::string& name) {
  std::string available;
  for (const Build& build : builds) {
    if (!build.supported()) continue;
    if (name == build.name) {
      current = &build;
      return;
    }
    available += std::string(available.empty() ? "" : ", ") + build.name;
  }
  throw std::invalid_argument("instruction set: got '" + name + "', expected one of " + available);
}

const Kernels& kernels() { return *current.load()->kernels; }

}  // namespace xattn
