// Small kernels that try one thing each.
#include "cuda/launch.h"
#include "selftest.h"

namespace xattn::cuda {
namespace {

struct Arguments {
  const float* a;
  const float* b;
  float* d;
  int64_t number;
};

// Times `number` products of zeros, for how long they take.
XATTN_KERNEL(32, 1) products_kernel(XATTN_PARAMETER Arguments args) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int64_t i = 0; i < args.number; i++) multiply_bfloat16(d, a, b);
  args.d[thread_index()] = d[0];
}
XATTN_KERNEL(128, 1) barriers_kernel(XATTN_PARAMETER Arguments args) {
  for (int64_t i = 0; i < args.number; i++) sync_threads();
}

}  // namespace

void selftest(const std::string& name, const float* a, const float* b, float* d, int64_t number) {
  const Arguments args{a, b, d, number};
  if (name == "products") return launch(products_kernel, "products", 1, 32, 0, nullptr, args);
  if (name == "barriers") return launch(barriers_kernel, "barriers", 1, 128, 0, nullptr, args);
  throw std::runtime_error("selftest: no kernel named " + name);
}

}  // namespace xattn::cuda
