// The cross-attention block for sm_90a: bfloat16, by products of warpgroups (sm90.h), on the data of block.h.
#pragma once

#include "block.h"

namespace xattn::cuda {

// Whether a device has sm_90a, this module has code for it, and XATTN_CUDA_SM90A=1 in the environment asks for it.
bool block_sm90_asked(Dtype dtype, const Limits& device);

// As chunk_of_sources and start_sources.
int64_t chunk_of_sources_sm90(const BlockSources& sources, const Limits& device);
void start_sources_sm90(const BlockSources& sources, const Table& table, const Chunks& chunks, float* partial,
                        Stream stream);

// How the target pass goes over its pairs: those of item i are from items[i] to items[i + 1], its tiles from first[i]
// to first[i + 1]. Both lists are for the table.
struct TargetPlan {
  std::vector<int64_t> items, first;
  int slots, stages, shared;
  bool stay;
};
// Whether an instance does.
bool targets_sm90_fit(int64_t channels, const Limits& device);
// Of targets (slot, weight), sorted by slot, and the outputs of each.
TargetPlan plan_targets_sm90(const BlockProblem& problem, const std::vector<std::pair<int64_t, int64_t>>& targets,
                             const std::vector<std::vector<int64_t>>& outputs, const Limits& device);
void start_targets_sm90(const BlockTargets& targets, const TargetPlan& plan, int items, int first, const Table& table,
                        Stream stream);

}  // namespace xattn::cuda
