#include <cstdlib>
#include <stdexcept>
#include <string>

#include "block_sm90.h"

namespace xattn::cuda {

#if defined(XATTN_HAVE_SM90A) || defined(XATTN_TWIN)

bool block_sm90_asked(Dtype dtype, const Limits& device) {
  const char* value = std::getenv("XATTN_CUDA_SM90A");
  return value != nullptr && std::string(value) == "1" && dtype == Dtype::kBFloat16 && device.capability == 90;
}

#else

// A module without code for sm_90a.
namespace {

[[noreturn]] void refuse() { throw std::runtime_error("block_sm90: this module has no code for sm_90a"); }

}  // namespace

bool block_sm90_asked(Dtype, const Limits&) { return false; }
int64_t chunk_of_sources_sm90(const BlockSources&, const Limits&) { return 0; }
void start_sources_sm90(const BlockSources&, const Table&, const Chunks&, float*, Stream) { refuse(); }
bool targets_sm90_fit(int64_t, const Limits&) { return false; }
TargetPlan plan_targets_sm90(const BlockProblem&, const std::vector<std::pair<int64_t, int64_t> >&,
                             const std::vector<std::vector<int64_t> >&, const Limits&) {
  refuse();
}
void start_targets_sm90(const BlockTargets&, const TargetPlan&, int, int, const Table&, Stream) { refuse(); }

#endif

}  // namespace xattn::cuda
