// The cross-attention block for inference: three passes over all edges.
//
//   sources   S = sum_n v_n k_n^T, Z = sum_n k_n of chunks of tokens, for every pair of a source and a set of weights
//             (block_source.cu); where channels are too many, or products are of float, keys and values are stored
//             (block_project.cu, block_plain.cu) and summed as those of linear cross-attention
//   states    of every output, the sum of its pairs' (block_states.cu)
//   targets   q once for every pair of a query and a set of weights, then its outputs, written where they are wanted
//             (block_target.cu, block_plain.cu)
#include <algorithm>
#include <map>
#include <utility>

#include "block.h"
#include "block_sm90.h"
#include "linear_states.h"
#include "operators.h"

namespace xattn::cuda {
namespace {

using Pair = std::pair<int64_t, int64_t>;  // a slot and a set of weights

// Projections to compute, each once, and who uses them.
struct Projections {
  std::vector<Pair> sources, targets;
  std::vector<std::vector<int64_t>> members;  // of outputs: sources
  std::vector<std::vector<int64_t>> results;  // of targets: outputs
};

Projections projections(const BlockProblem& problem, int64_t outputs_of_target) {
  Projections found;
  std::map<Pair, int64_t> source_numbers, target_numbers;
  // By slot, so that works that read the same tokens follow each other.
  for (int64_t i = 0; i < problem.edges.by_source.size; ++i) {
    const Edge& edge = problem.edges.all[problem.edges.by_source[i]];
    const Pair pair{edge.source, edge.weight};
    if (source_numbers.emplace(pair, found.sources.size()).second) found.sources.push_back(pair);
  }
  for (int64_t output = 0; output < problem.outputs.size; ++output) {
    found.members.emplace_back();
    for (int64_t e = problem.edges.output_begin[output]; e < problem.edges.output_begin[output + 1]; ++e)
      found.members.back().push_back(source_numbers[{problem.edges.all[e].source, problem.edges.all[e].weight}]);
  }
  for (int64_t i = 0; i < problem.edges.by_query.size; ++i) {
    const int64_t number = problem.edges.by_query[i];
    const Edge& edge = problem.edges.all[number];
    if (problem.edges.output_begin[edge.output] != number) continue;  // edges of an output share its query
    const Pair pair{edge.query, edge.weight};
    const auto place = target_numbers.find(pair);
    if (place == target_numbers.end() ||
        static_cast<int64_t>(found.results[static_cast<size_t>(place->second)].size()) == outputs_of_target) {
      target_numbers[pair] = static_cast<int64_t>(found.targets.size());
      found.targets.push_back(pair);
      found.results.emplace_back();
    }
    found.results[static_cast<size_t>(target_numbers[pair])].push_back(edge.output);
  }
  return found;
}

std::vector<int64_t> flat(const std::vector<Pair>& pairs) {
  std::vector<int64_t> numbers;
  for (const auto& [slot, weight] : pairs) numbers.insert(numbers.end(), {slot, weight});
  return numbers;
}

}  // namespace

void block_forward(const BlockProblem& problem, int64_t sets, const Call& call) {
  const DeviceGuard guard(call.device);
  const bool bfloat16 = problem.dtype == Dtype::kBFloat16, tf32 = problem.dtype == Dtype::kFloat16 || call.tf32;
  const int64_t padded = padded_channels(problem.channels), element = bfloat16 ? 2 : 4;
  const Limits device = limits();
  const bool sm90 = block_sm90_asked(problem.dtype, device);
  const bool targets_sm90 = sm90 && targets_sm90_fit(problem.channels, device);
  const int64_t most = bfloat16 && !targets_sm90 ? chain_outputs(problem.channels) : problem.outputs.size;
  const Projections found = projections(problem, most);
  const char* packed = static_cast<const char*>(problem.packed);
  const PackedBlock weights{packed,
                            reinterpret_cast<const float*>(packed + sets * kProjections * padded * padded * element)};
  std::vector<int64_t> source_tokens;
  int64_t longest_target = 0;
  for (const Pair& pair : found.sources) source_tokens.push_back(problem.features[pair.first].tokens);
  for (const Pair& pair : found.targets) longest_target = std::max(longest_target, problem.features[pair.first].tokens);

  Scratch scratch;
  TableBuilder table;
  const int features = table.add(problem.features), outputs = table.add(problem.outputs);
  BlockSources sources{problem.dtype,
                       tf32,
                       weights,
                       problem.batch,
                       problem.channels,
                       static_cast<int64_t>(found.sources.size()),
                       *std::max_element(source_tokens.begin(), source_tokens.end()),
                       features,
                       table.add(flat(found.sources)),
                       0,
                       0};
  int64_t chunk = sm90 ? chunk_of_sources_sm90(sources, device) : 0;
  const bool sources_sm90 = chunk > 0;
  if (!sources_sm90) chunk = chunk_of_sources(sources);
  const bool stored = chunk == 0;
  int64_t rows = 0;
  for (const int64_t tokens : source_tokens) rows += tokens * problem.batch;
  int64_t keys = 0, values = 0;
  if (stored) {
    const int64_t pieces = (problem.channels / 48 + 1) * ((problem.channels + 47) / 48);
    chunk = chunk_tokens(sources.longest, sources.count * problem.batch * pieces, 128, limits().processors);
    keys = scratch.reserve<char>(rows * padded * element);
    values = scratch.reserve<char>(rows * padded * element);
    const std::vector<int64_t> unknown(5 * found.sources.size());
    sources.keys = table.add(unknown);
    sources.values = table.add(unknown);
  }
  const int target_pairs = table.add(flat(found.targets));
  const int members = table.add_lists(found.members), results = table.add_lists(found.results);
  TargetPlan plan{};
  if (targets_sm90) plan = plan_targets_sm90(problem, found.targets, found.results, device);
  const int items = table.add(plan.items), first = table.add(plan.first);
  const Chunks chunks =
      make_chunks(source_tokens, problem.batch, problem.channels, problem.channels, chunk, table, scratch);
  const int64_t count = problem.outputs.size * problem.batch;
  const int64_t s = scratch.reserve<char>(count * padded * padded * element);
  const int64_t z = scratch.reserve<float>(count * padded);
  table.reserve(scratch);
  scratch.allocate(call);
  if (stored) {
    int64_t row = 0;
    for (size_t i = 0; i < source_tokens.size(); ++i) {
      for (const auto& [first, offset] : {std::pair{sources.keys, keys}, std::pair{sources.values, values}})
        table.set(first, static_cast<int64_t>(i),
                  {scratch.at<char>(offset) + row * padded * element, source_tokens[i] * padded, 1, padded,
                   source_tokens[i]});
      row += source_tokens[i] * problem.batch;
    }
  }
  const Table device_table = table.finish(scratch, call.stream);
  float* partial = scratch.at<float>(chunks.offset);

  if (stored) {
    if (bfloat16)
      start_chain_projections(sources, device_table, call.stream);
    else
      start_plain_projections(sources, device_table, call.stream);
    start_linear_states({bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, FeatureMap::kIdentity, tf32, problem.batch,
                         problem.channels, problem.channels, sources.keys, sources.values, nullptr, 0},
                        device_table, chunks, partial, call.stream);
  } else if (sources_sm90) {
    start_sources_sm90(sources, device_table, chunks, partial, call.stream);
  } else {
    start_sources(sources, device_table, chunks, partial, call.stream);
  }
  const BlockStates states{scratch.at<char>(s), scratch.at<float>(z)};
  sum_block_states(problem.dtype, problem.outputs.size, members, device_table, chunks, partial, states, call.stream);
  // A quotient is computed as a product with an inverse, which must be finite.
  const float eps = std::max(static_cast<float>(problem.eps), 1e-37f);
  const BlockTargets targets{problem.dtype,
                             tf32,
                             weights,
                             states,
                             problem.batch,
                             problem.channels,
                             eps,
                             static_cast<int64_t>(found.targets.size()),
                             longest_target,
                             features,
                             outputs,
                             target_pairs,
                             results};
  if (targets_sm90) {
    start_targets_sm90(targets, plan, items, first, device_table, call.stream);
  } else if (bfloat16) {
    size_t longest_list = 0;
    for (const auto& list : found.results) longest_list = std::max(longest_list, list.size());
    start_chain_targets(targets, static_cast<int64_t>(longest_list), device_table, call.stream);
  } else {
    start_plain_targets(targets, device_table, call.stream);
  }
}

}  // namespace xattn::cuda
