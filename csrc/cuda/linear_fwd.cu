// Linear cross-attention, forward.
//
//   S_o = sum_edges(o) sum_n v_n phi(k_n)^T    Z_o = sum_edges(o) sum_n phi(k_n)
//   out_o[:, m] = S_o phi(q_m) / max(Z_o . phi(q_m), eps)
//
// Plan: (1) partial states of chunks of every source (linear_states.cu); (2) their sums for every output
// (states.cu); (3) here: a block has some rows of S in shared memory and goes through a run of an output's
// tokens, tile by tile, the next one on its way. The denominator is a sum of float32 products.
#include <algorithm>

#include "linear_states.h"
#include "maths.h"
#include "operators.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 256;

// Sizes that a call chooses. Offsets are bytes of shared memory.
struct Geometry {
  int channels, rows, tokens, stages;  // of a tile, padded: of queries, of S at a time, of a tile
  int queries, outputs, z, parts, denominators, shared;
};

struct Arguments {
  Table table;
  Dtype dtype;
  FeatureMap feature_map;
  float eps;
  int queries, outputs;  // in the table: views, a query for every output
  int64_t batch, channels, value_channels;
  int64_t groups, runs, run, works;  // of rows; of tokens of an output, and their length
  const float *s, *z;
  Geometry geometry;
};

template <class Products>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work) : args_(args), geometry_(args.geometry) {
    row_ = static_cast<int>(work % args.groups) * geometry_.rows;
    work /= args.groups;
    begin_ = work % args.runs * args.run;
    work /= args.runs;
    batch_ = work % args.batch;
    output_ = work / args.batch;
    query_ = args.table.view(args.queries, output_);
    out_ = args.table.view(args.outputs, output_);
    end_ = begin_ + args.run < out_.tokens ? begin_ + args.run : out_.tokens;
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_) return;
    query_access_ = access<E>(query_, args_.dtype);
    out_access_ = access<E>(out_, args_.dtype);
    const int left = static_cast<int>(args_.value_channels) - row_;
    rows_ = left < geometry_.rows ? left : geometry_.rows;
    load(0);
    load_state();
    XATTN_KEEP_LOOP
    for (int number = 0; begin_ + number * geometry_.tokens < end_; ++number) {
      if (geometry_.stages == 2) {
        load(number + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync_threads();
      attend(number);
      sync_threads();
      if (geometry_.stages == 1) load(number + 1);
      store_tile(out_, out_access_, {batch_, row_, token(number), rows_, tokens(number)}, outputs());
    }
    // Nothing is on its way here: the last load found no tokens. What the next work writes before its first
    // barrier was read before the last one here.
  }

 private:
  template <class T>
  static XATTN_DEVICE T* shared(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  XATTN_DEVICE int64_t token(int number) const { return begin_ + static_cast<int64_t>(number) * geometry_.tokens; }
  XATTN_DEVICE int tokens(int number) const {
    const int64_t left = end_ - token(number);
    return left < geometry_.tokens ? static_cast<int>(left) : geometry_.tokens;
  }
  XATTN_DEVICE Tile<E> queries(int number) const {
    const int size = tile_elements<P>(geometry_.channels, geometry_.tokens);
    return make_tile<P>(shared<E>(geometry_.queries) + number % geometry_.stages * size, query_access_.token_minor,
                        geometry_.channels, geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> outputs() const {
    return make_tile<P>(shared<E>(geometry_.outputs), out_access_.token_minor, geometry_.rows, geometry_.tokens);
  }
  XATTN_DEVICE Operand<E> state() const { return {shared<E>(0), row_stride<P>(geometry_.channels), true}; }

  XATTN_DEVICE void load(int number) const {
    if (token(number) < end_)
      load_tile(query_, query_access_, {batch_, 0, token(number), static_cast<int>(args_.channels), tokens(number)},
                queries(number), geometry_.channels, geometry_.tokens);
    commit_copies();
  }

  XATTN_DEVICE void load_state() const {
    const int64_t state = output_ * args_.batch + batch_, channels = args_.channels;
    const float* s = args_.s + (state * args_.value_channels + row_) * channels;
    E* to = shared<E>(0);
    const int stride = row_stride<P>(geometry_.channels);
    for_rows(geometry_.rows, geometry_.channels, [&](int row, int channel) {
      const float x = row < rows_ && channel < channels ? s[row * channels + channel] : 0.0f;
      to[row * stride + channel] = from_float<E>(x);
    });
    float* z = shared<float>(geometry_.z);
    for (int channel = thread_index(); channel < channels; channel += kThreads)
      z[channel] = args_.z[state * channels + channel];
  }

  // Denominators of a tile: parts of every sum, then their sums, clamped.
  XATTN_DEVICE void denominators(const Tile<E>& q) const {
    const float* z = shared<float>(geometry_.z);
    float* parts = shared<float>(geometry_.parts);
    const int count = kThreads / geometry_.tokens;
    const int n = thread_index() % geometry_.tokens, part = thread_index() / geometry_.tokens;
    float sum = 0.0f;
    for (int channel = part; channel < args_.channels; channel += count)
      sum = fused_multiply_add(z[channel], to_float(*q.at(channel, n)), sum);
    parts[part * geometry_.tokens + n] = sum;
    sync_threads();
    if (thread_index() < geometry_.tokens) {
      sum = 0.0f;
      for (int i = 0; i < count; ++i) sum += parts[i * geometry_.tokens + n];
      shared<float>(geometry_.denominators)[n] = sum < args_.eps ? args_.eps : sum;
    }
  }

  XATTN_DEVICE void attend(int number) const {
    const Tile<E> q = queries(number), out = outputs();
    const FeatureMap name = args_.feature_map;
    const int channels = static_cast<int>(args_.channels);
    map_tile(q, geometry_.channels, geometry_.tokens,
             [=](float x, int channel, int) { return channel < channels ? feature_map<P::kExact>(name, x) : 0.0f; });
    sync_threads();
    denominators(q);
    sync_threads();
    const float* d = shared<float>(geometry_.denominators);
    multiply_tiles<P, 3, 2>(state(), q.over_channels(), geometry_.rows, geometry_.tokens, geometry_.channels,
                            [&](int row, int column, Accumulator<3, 2>& sum, int rows, int columns) {
                              sum.for_pairs(rows, columns, [&](int r, int c, float x, float y) {
                                const int n = column + c;
                                put_pair(out, row + r, n, x / d[n], y / d[n + 1]);
                              });
                            });
  }

  const Arguments& args_;
  const Geometry& geometry_;
  View query_, out_;
  Access query_access_, out_access_;
  int64_t output_, batch_, begin_, end_;
  int row_, rows_;
};

template <class P>
XATTN_KERNEL(kThreads, 1)
output_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P>(args, work).run();
}

template <class P>
Geometry geometry(int channels, int rows, int tokens, int stages) {
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element)), kFloat = static_cast<int>(sizeof(float));
  Geometry g{channels, rows, tokens, stages, 0, 0, 0, 0, 0, 0};
  g.queries = rows * row_stride<P>(channels) * kBytes;
  g.outputs = g.queries + stages * tile_elements<P>(channels, tokens) * kBytes;
  g.z = g.outputs + tile_elements<P>(rows, tokens) * kBytes;
  g.parts = g.z + channels * kFloat;
  g.denominators = g.parts + kThreads * kFloat;
  g.shared = g.denominators + tokens * kFloat;
  return g;
}

// The first choice of which two blocks fit a processor, else the first of which one does.
template <class P>
Geometry choose_geometry(int64_t channels, int64_t value_channels, int shared_bytes) {
  struct Choice {
    int tokens, rows, stages;
  };
  constexpr Choice kChoices[] = {{128, 96, 2}, {128, 48, 2}, {64, 96, 2}, {64, 48, 2}, {32, 96, 2},
                                 {32, 48, 2},  {32, 48, 1},  {32, 32, 1}, {32, 16, 1}};
  const auto padded = [](int64_t width) { return static_cast<int>((width + 15) / 16 * 16); };
  Geometry last{};
  for (const int limit : {shared_bytes / 2 - 1024, shared_bytes}) {
    for (const Choice& choice : kChoices) {
      last = geometry<P>(padded(channels), std::min(choice.rows, padded(value_channels)), choice.tokens, choice.stages);
      if (last.shared <= limit) return last;
    }
  }
  return last;
}

template <class P>
void start_outputs(Arguments args, int64_t outputs, int64_t longest, Stream stream) {
  const Limits device = limits();
  args.geometry = choose_geometry<P>(args.channels, args.value_channels, device.shared_bytes);
  args.groups = (args.value_channels + args.geometry.rows - 1) / args.geometry.rows;
  args.run = chunk_tokens(longest, outputs * args.batch * args.groups, args.geometry.tokens, device.processors);
  args.runs = (longest + args.run - 1) / args.run;
  args.works = args.groups * args.runs * args.batch * outputs;
  launch(output_kernel<P>, "linear_outputs", args.works, kThreads, static_cast<size_t>(args.geometry.shared), stream,
         args);
}

}  // namespace

void linear_forward(const LinearProblem& problem, const Call& call) {
  const DeviceGuard guard(call.device);
  Scratch scratch;
  TableBuilder table;
  std::vector<View> queries;
  std::vector<std::vector<int64_t>> sources;
  int64_t longest = 0;
  for (int64_t output = 0; output < problem.outputs.size; ++output) {
    queries.push_back(problem.queries[problem.edges.query_of(output)]);
    longest = std::max(longest, problem.outputs[output].tokens);
    sources.emplace_back();
    for (int64_t e = problem.edges.output_begin[output]; e < problem.edges.output_begin[output + 1]; ++e)
      sources.back().push_back(problem.edges.all[e].source);
  }
  std::vector<int64_t> tokens;
  int64_t longest_source = 0;
  for (int64_t slot = 0; slot < problem.keys.size; ++slot) {
    tokens.push_back(problem.keys[slot].tokens);
    longest_source = std::max(longest_source, tokens.back());
  }
  const int query_rows = table.add({queries.data(), static_cast<int64_t>(queries.size())});
  const int output_rows = table.add(problem.outputs);
  const LinearStates states{problem.dtype,
                            problem.feature_map,
                            call.tf32,
                            problem.batch,
                            problem.channels,
                            problem.value_channels,
                            table.add(problem.keys),
                            table.add(problem.values),
                            nullptr,
                            0};
  const Chunks chunks = make_chunks(tokens, problem.batch, problem.value_channels, problem.channels,
                                    linear_chunk(problem, problem.keys.size, longest_source), table, scratch);
  const int lists = table.add_lists(sources);
  table.reserve(scratch);
  scratch.allocate(call);
  const Table device_table = table.finish(scratch, call.stream);
  float* partial = scratch.at<float>(chunks.offset);
  float *s = static_cast<float*>(problem.state_s), *z = static_cast<float*>(problem.state_z);

  start_linear_states(states, device_table, chunks, partial, call.stream);
  sum_states(device_table, chunks, partial,
             {lists, problem.outputs.size, static_cast<const float*>(problem.initial_s),
              static_cast<const float*>(problem.initial_z), false, s, z},
             call.stream);
  const Arguments args{device_table,
                       problem.dtype,
                       problem.feature_map,
                       static_cast<float>(problem.eps),
                       query_rows,
                       output_rows,
                       problem.batch,
                       problem.channels,
                       problem.value_channels,
                       0,
                       0,
                       0,
                       0,
                       s,
                       z,
                       {}};
  if (problem.dtype == Dtype::kBFloat16)
    start_outputs<BFloat16Products>(args, problem.outputs.size, longest, call.stream);
  else if (problem.dtype == Dtype::kFloat16 || call.tf32)
    start_outputs<Tf32Products>(args, problem.outputs.size, longest, call.stream);
  else
    start_outputs<IeeeProducts>(args, problem.outputs.size, longest, call.stream);
}

}  // namespace xattn::cuda
