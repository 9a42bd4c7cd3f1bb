// Softmax cross-attention, backward. Scores are computed anew from the log-sum-exp; with g the gradient of an
// output and h that of its log-sum-exp, head by head:
//
//   D_m = g_m . out_m - h_m      p_mn = exp(scale q_m . k_n - lse_m)      ds_mn = p_mn (g_m . v_n - D_m)
//   dq_m = scale sum_n ds_mn k_n      dk_n = scale sum_m ds_mn q_m      dv_n = sum_m p_mn g_m
//
// Plan: (1) here: D, and the log-sum-exp to base 2, side by side for every query; (2) dq, (3) dk and dv
// (softmax_gradients.cu), which read these.
#include <algorithm>

#include "softmax_bwd.h"

namespace xattn::cuda {
namespace {

constexpr int kParts = 4;  // threads that share a query
constexpr int kStatisticsThreads = kStatistics * kParts;

struct StatisticsArguments {
  Table table;
  Dtype dtype;
  int outputs, gradients, lse, lse_gradients, statistics, channels;
  uint32_t batch, heads, steps, works;
  Statistics* to;
};

// Of a tile of an output's queries.
XATTN_KERNEL(kStatisticsThreads, 4) statistics_kernel(XATTN_PARAMETER StatisticsArguments args) {
  float* parts = reinterpret_cast<float*>(shared_memory());
  XATTN_KEEP_LOOP
  for (int64_t at = block_index(); at < args.works; at += block_count()) {
    uint32_t work = static_cast<uint32_t>(at);
    const int64_t begin = static_cast<int64_t>(work % args.steps) * kStatistics;
    work /= args.steps;
    const int64_t head = work % args.heads;
    work /= args.heads;
    const int64_t batch = work % args.batch, slot = work / args.batch;
    const View out = args.table.view(args.outputs, slot), gradient = args.table.view(args.gradients, slot);
    if (begin >= out.tokens) continue;
    const int i = thread_index();
    const bool token_minor = is_token_minor(out);
    const int n = token_minor ? i % kStatistics : i / kParts, part = token_minor ? i / kStatistics : i % kParts;
    const int64_t token = begin + n;
    float sum = 0.0f;
    if (gradient.data != nullptr && token < out.tokens) {
      XATTN_KEEP_LOOP
      for (int c = part; c < args.channels; c += kParts) {
        const int64_t channel = head * args.channels + c;
        const auto element = [&](const View& view) {
          return load_element(view.data, args.dtype,
                              batch * view.batch_stride + channel * view.channel_stride + token * view.token_stride);
        };
        sum = fused_multiply_add(element(out), element(gradient), sum);
      }
    }
    parts[part * kStatistics + n] = sum;
    sync_threads();
    if (i < kStatistics) {
      const int64_t row = batch * args.heads + head, mine = begin + i;
      Statistics result{0.0f, 0.0f};
      if (mine < out.tokens) {
        const float* lse = reinterpret_cast<const float*>(args.table[args.lse + slot]) + row * out.tokens;
        const float* h = reinterpret_cast<const float*>(args.table[args.lse_gradients + slot]);
        result.lse = lse[mine] * kLog2E;
        for (int p = 0; p < kParts; ++p) result.delta += parts[p * kStatistics + i];
        if (h != nullptr) result.delta -= h[row * out.tokens + mine];
      }
      args.to[args.table[args.statistics + 2 * slot] + row * args.table[args.statistics + 2 * slot + 1] + mine] =
          result;
    }
    sync_threads();
  }
}

}  // namespace

void softmax_backward(const SoftmaxProblem& problem, const SoftmaxGradients& gradients, const Call& call) {
  const DeviceGuard guard(call.device);
  Scratch scratch;
  TableBuilder table;
  const EdgeList& edges = problem.edges;
  const int64_t outputs = problem.outputs.size;
  // Outputs without any gradient have no part in this.
  const auto counts = [&](int64_t output) {
    return gradients.grad_outputs[output].data != nullptr || gradients.grad_lse[output] != nullptr;
  };
  std::vector<View> queries;
  std::vector<int64_t> statistics, lse, lse_gradients;
  std::vector<std::vector<int64_t>> by_query(static_cast<size_t>(problem.queries.size)),
      by_source(static_cast<size_t>(problem.keys.size)), by_output(static_cast<size_t>(outputs));
  const auto longest = [](Span<const View> views) {
    int64_t tokens = 0;
    for (int64_t i = 0; i < views.size; ++i) tokens = std::max(tokens, views[i].tokens);
    return tokens;
  };
  const int64_t longest_query = longest(problem.queries), longest_source = longest(problem.keys);
  int64_t total = 0;
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t query = edges.query_of(output), tokens = problem.queries[query].tokens;
    queries.push_back(problem.queries[query]);
    lse.push_back(reinterpret_cast<int64_t>(problem.lse[output]));
    lse_gradients.push_back(reinterpret_cast<int64_t>(gradients.grad_lse[output]));
    const int64_t padded = (tokens + kStatistics - 1) / kStatistics * kStatistics;
    statistics.insert(statistics.end(), {total, padded});
    total += problem.batch * problem.heads * padded;
    if (!counts(output)) continue;
    by_query[static_cast<size_t>(query)].push_back(output);
    for (int64_t e = edges.output_begin[output]; e < edges.output_begin[output + 1]; ++e) {
      const int64_t source = edges.all[e].source;
      by_output[static_cast<size_t>(output)].push_back(source);
      by_source[static_cast<size_t>(source)].push_back(output);
    }
  }
  GradientArguments args{};
  args.dtype = problem.dtype;
  args.layout = common_layout({problem.queries, problem.keys, problem.values, gradients.grad_outputs});
  args.scale = static_cast<float>(problem.scale);
  args.exponent_scale = static_cast<float>(problem.scale * 1.4426950408889634);
  args.channels[0] = static_cast<int>(problem.channels / problem.heads);
  args.channels[1] = static_cast<int>(problem.value_channels / problem.heads);
  args.batch = static_cast<uint32_t>(problem.batch);
  args.heads = static_cast<uint32_t>(problem.heads);
  args.statistics = table.add(statistics);
  const int query_slots = table.add(problem.queries), query_rows = table.add({queries.data(), outputs}),
            key_rows = table.add(problem.keys), value_rows = table.add(problem.values),
            output_rows = table.add(problem.outputs), gradient_rows = table.add(gradients.grad_outputs),
            query_results = table.add(gradients.queries), key_results = table.add(gradients.keys),
            value_results = table.add(gradients.values), query_lists = table.add_lists(by_query),
            output_lists = table.add_lists(by_output), source_lists = table.add_lists(by_source),
            lse_row = table.add(lse), lse_gradient_row = table.add(lse_gradients);
  const int64_t memory = scratch.reserve<Statistics>(total);
  table.reserve(scratch);
  scratch.allocate(call);
  args.table = table.finish(scratch, call.stream);
  Statistics* all = scratch.at<Statistics>(memory);
  args.all_statistics = all;

  StatisticsArguments first{args.table,
                            problem.dtype,
                            output_rows,
                            gradient_rows,
                            lse_row,
                            lse_gradient_row,
                            args.statistics,
                            args.channels[1],
                            args.batch,
                            args.heads,
                            0,
                            0,
                            all};
  first.steps = static_cast<uint32_t>((longest_query + kStatistics - 1) / kStatistics);
  first.works = works("softmax_statistics", {outputs, problem.batch, problem.heads, first.steps});
  launch(statistics_kernel, "softmax_statistics", first.works, kStatisticsThreads, kStatisticsThreads * sizeof(float),
         call.stream, first);

  const auto wanted = [](Span<const View> views) {
    return std::any_of(views.data, views.data + views.size, [](const View& view) { return view.data != nullptr; });
  };
  if (wanted(gradients.queries)) {
    GradientArguments mine = args;
    mine.own[0] = query_slots, mine.own[1] = gradient_rows;
    mine.other[0] = key_rows, mine.other[1] = value_rows;
    mine.results[0] = query_results, mine.results[1] = query_results;
    mine.outer = query_lists, mine.lists = output_lists;
    start_query_gradients(mine, call.tf32, problem.queries.size, longest_query, call.stream);
  }
  if (wanted(gradients.keys) || wanted(gradients.values)) {
    GradientArguments mine = args;
    mine.own[0] = key_rows, mine.own[1] = value_rows;
    mine.other[0] = query_rows, mine.other[1] = gradient_rows;
    mine.results[0] = key_results, mine.results[1] = value_results;
    mine.lists = source_lists;
    start_source_gradients(mine, call.tf32, problem.keys.size, longest_source, call.stream);
  }
}

}  // namespace xattn::cuda
