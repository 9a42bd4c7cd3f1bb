// Linear cross-attention, backward.
//
//   dS = sum_m g_m phi(q_m)^T / d_m    dZ = -sum_m c_m phi(q_m) / d_m    (plus those of S and Z themselves)
//   dphi(k_n) = dS^T v_n + dZ          dv_n = dS phi(k_n)
//
// Plan: (1) gradients of queries, which leave 1 / d and -c of every token (linear_bwd_queries.cu);
// (2) with these as weights, partial dS and dZ of chunks of every output's tokens, as states are made in the
// forward pass (linear_states.cu); (3) their sums for initial states and for every source (states.cu);
// (4) here: a block has some rows of dS, for dv, some columns, for dk, or all of it for both, in shared
// memory and goes through a run of a source's tokens.
#include <algorithm>

#include "linear_bwd.h"
#include "linear_states.h"
#include "maths.h"
#include "operators.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 256;

// Gradients of keys and values from those of the states that sources contribute to.
struct SourceGradients {
  Dtype dtype;
  FeatureMap feature_map;
  bool tf32;
  int64_t batch, channels, value_channels;
  int64_t count, longest;                        // sources, tokens of the longest
  int keys, values, key_results, value_results;  // in the table: views
  const float *s, *z;  // (sources, batch, value_channels, channels) and (sources, batch, channels)
};

// Sizes that a call chooses, padded; offsets are bytes of shared memory.
struct Geometry {
  int channels, values;      // widths
  int key_rows, value_rows;  // of dk and dv that a block makes; all of both, or one of them at a time
  int tokens, stages;        // of a tile
  bool both;
  int z, keys, inputs, outputs, stage, shared;
};

struct Arguments {
  Table table;
  SourceGradients problem;
  int64_t groups, key_groups, runs, run, works;
  Geometry geometry;
};

template <class Products>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work)
      : args_(args), problem_(args.problem), geometry_(args.geometry) {
    const int group = static_cast<int>(work % args.groups);
    work /= args.groups;
    begin_ = work % args.runs * args.run;
    work /= args.runs;
    batch_ = work % problem_.batch;
    slot_ = work / problem_.batch;
    key_ = args.table.view(problem_.keys, slot_);
    value_ = args.table.view(problem_.values, slot_);
    end_ = begin_ + args.run < key_.tokens ? begin_ + args.run : key_.tokens;
    const bool keys = geometry_.both || group < args.key_groups;
    const bool values = geometry_.both || group >= args.key_groups;
    key_row_ = keys && !geometry_.both ? group * geometry_.key_rows : 0;
    value_row_ = values && !geometry_.both ? (group - static_cast<int>(args.key_groups)) * geometry_.value_rows : 0;
    keys_ = keys && key_result().data != nullptr;
    values_ = values && value_result().data != nullptr;
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_ || (!keys_ && !values_)) return;
    key_access_ = access<E>(key_, problem_.dtype);
    value_access_ = access<E>(value_, problem_.dtype);
    const int channels = static_cast<int>(problem_.channels), values = static_cast<int>(problem_.value_channels);
    key_rows_ = least(channels - key_row_, geometry_.key_rows);
    value_rows_ = least(values - value_row_, geometry_.value_rows);
    load(0);
    load_state();
    XATTN_KEEP_LOOP
    for (int number = 0; token(number) < end_; ++number) {
      if (geometry_.stages == 2) {
        load(number + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync_threads();
      map_keys(number);
      sync_threads();
      if (values_) value_gradients(number);
      if (keys_) key_gradients(number);
      sync_threads();
      if (geometry_.stages == 1) load(number + 1);
      if (values_)
        store(value_result(), value_row_, value_rows_, number, value_outputs(is_token_minor(value_result())));
      if (keys_) store(key_result(), key_row_, key_rows_, number, key_outputs(is_token_minor(key_result())));
    }
    wait_copies<0>();
    sync_threads();
  }

 private:
  static XATTN_DEVICE int least(int a, int b) { return a < b ? a : b; }
  static XATTN_DEVICE int padded(int width) { return (width + 15) / 16 * 16; }
  template <class T>
  static XATTN_DEVICE T* shared(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  XATTN_DEVICE int64_t token(int number) const { return begin_ + static_cast<int64_t>(number) * geometry_.tokens; }
  XATTN_DEVICE int tokens(int number) const {
    const int64_t left = end_ - token(number);
    return left < geometry_.tokens ? static_cast<int>(left) : geometry_.tokens;
  }

  // Read again where they are needed: registers are few.
  XATTN_DEVICE View key_result() const { return args_.table.view(problem_.key_results, slot_); }
  XATTN_DEVICE View value_result() const { return args_.table.view(problem_.value_results, slot_); }
  XATTN_DEVICE void store(const View& view, int row, int rows, int number, const Tile<E>& from) const {
    store_tile(view, access<E>(view, problem_.dtype), {batch_, row, token(number), rows, tokens(number)}, from);
  }

  // Of a tile: all keys for dv, or the rows of dk alone; all values for dk. Where a block makes one of the
  // two, it needs the wide tile of one and at most a few rows of the other.
  XATTN_DEVICE bool all_keys() const { return values_; }
  XATTN_DEVICE int key_begin() const { return all_keys() ? 0 : key_row_; }
  XATTN_DEVICE int key_count() const { return all_keys() ? static_cast<int>(problem_.channels) : key_rows_; }
  XATTN_DEVICE Tile<E> keys(int number) const {
    return make_tile<P>(shared<E>(geometry_.keys + number % geometry_.stages * geometry_.stage),
                        key_access_.token_minor, all_keys() ? geometry_.channels : geometry_.key_rows,
                        geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> values(int number) const {
    return make_tile<P>(shared<E>(geometry_.inputs + number % geometry_.stages * geometry_.stage),
                        value_access_.token_minor, geometry_.values, geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> value_outputs(bool token_minor) const {
    return make_tile<P>(shared<E>(geometry_.outputs), token_minor, geometry_.value_rows, geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> key_outputs(bool token_minor) const {
    const int before = values_ ? tile_elements<P>(geometry_.value_rows, geometry_.tokens) : 0;
    return make_tile<P>(shared<E>(geometry_.outputs) + before, token_minor, geometry_.key_rows, geometry_.tokens);
  }
  // Of dS: rows of values, columns of channels.
  XATTN_DEVICE int state_stride() const {
    return row_stride<P>(keys_ && !values_ ? geometry_.key_rows : geometry_.channels);
  }

  XATTN_DEVICE void load(int number) const {
    if (token(number) < end_) {
      load_tile(key_, key_access_, {batch_, key_begin(), token(number), key_count(), tokens(number)}, keys(number),
                padded(key_count()), geometry_.tokens);
      if (keys_)
        load_tile(value_, value_access_,
                  {batch_, 0, token(number), static_cast<int>(problem_.value_channels), tokens(number)}, values(number),
                  geometry_.values, geometry_.tokens);
    }
    commit_copies();
  }

  XATTN_DEVICE void load_state() const {
    const int64_t number = slot_ * problem_.batch + batch_, channels = problem_.channels;
    const int rows = keys_ ? static_cast<int>(problem_.value_channels) : value_rows_;
    const int columns = values_ ? static_cast<int>(channels) : key_rows_;
    const float* s = problem_.s + (number * problem_.value_channels + value_row_) * channels + key_row_;
    E* to = shared<E>(0);
    const int stride = state_stride();
    for_rows(padded(rows), padded(columns), [&](int row, int column) {
      to[row * stride + column] = from_float<E>(row < rows && column < columns ? s[row * channels + column] : 0.0f);
    });
    float* z = shared<float>(geometry_.z);
    for (int i = thread_index(); i < geometry_.key_rows; i += kThreads)
      z[i] = i < key_rows_ ? problem_.z[number * channels + key_row_ + i] : 0.0f;
  }

  XATTN_DEVICE void map_keys(int number) const {
    const FeatureMap name = problem_.feature_map;
    const int channels = key_count();
    map_tile(keys(number), padded(channels), geometry_.tokens,
             [=](float x, int channel, int) { return channel < channels ? feature_map<P::kExact>(name, x) : 0.0f; });
  }

  XATTN_DEVICE void value_gradients(int number) const {
    const Tile<E> to = value_outputs(is_token_minor(value_result()));
    multiply_tiles<P, 3, 2>(
        {shared<E>(0), state_stride(), true}, keys(number).over_channels(), padded(value_rows_), geometry_.tokens,
        geometry_.channels, [&](int row, int column, Accumulator<3, 2>& sum, int rows, int columns) {
          sum.for_pairs(rows, columns,
                        [&](int r, int c, float x, float y) { put_pair(to, row + r, column + c, x, y); });
        });
  }

  XATTN_DEVICE void key_gradients(int number) const {
    const Tile<E> to = key_outputs(is_token_minor(key_result())), k = keys(number);
    const int shift = key_row_ - key_begin();
    const float* z = shared<float>(geometry_.z);
    const FeatureMap name = problem_.feature_map;
    multiply_tiles<P, 3, 2>({shared<E>(0), state_stride(), false}, values(number).over_channels(), padded(key_rows_),
                            geometry_.tokens, geometry_.values,
                            [&](int row, int column, Accumulator<3, 2>& sum, int rows, int columns) {
                              sum.for_pairs(rows, columns, [&](int r, int c, float x, float y) {
                                const int i = row + r, n = column + c;
                                const float a = to_float(*k.at(shift + i, n)), b = to_float(*k.at(shift + i, n + 1));
                                put_pair(to, i, n, (x + z[i]) * feature_map_slope<P::kExact>(name, a),
                                         (y + z[i]) * feature_map_slope<P::kExact>(name, b));
                              });
                            });
  }

  const Arguments& args_;
  const SourceGradients& problem_;
  const Geometry& geometry_;
  View key_, value_;
  Access key_access_, value_access_;
  int64_t slot_, batch_, begin_, end_;
  int key_row_, value_row_, key_rows_, value_rows_;
  bool keys_, values_;
};

template <class P>
XATTN_KERNEL(kThreads, 2)
source_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P>(args, work).run();
}

template <class P>
Geometry geometry(int channels, int values, int rows, int tokens, int stages) {
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element)), kFloat = static_cast<int>(sizeof(float));
  Geometry g{};
  g.channels = channels;
  g.values = values;
  g.both = rows == 0;
  g.key_rows = g.both ? channels : std::min(rows, channels);
  g.value_rows = g.both ? values : std::min(rows, values);
  g.tokens = tokens;
  g.stages = stages;
  const int all = tile_elements<P>(channels, tokens), few = tile_elements<P>(g.key_rows, tokens);
  const int inputs = tile_elements<P>(values, tokens), outputs = tile_elements<P>(g.value_rows, tokens);
  const int state = g.both ? values * row_stride<P>(channels)
                           : std::max(g.value_rows * row_stride<P>(channels), values * row_stride<P>(g.key_rows));
  g.z = state * kBytes;
  g.keys = g.z + g.key_rows * kFloat;
  g.inputs = g.keys + (g.both ? all : few) * kBytes;
  g.stage = (g.both ? all + inputs : std::max(all, few + inputs)) * kBytes;
  g.outputs = g.keys + stages * g.stage;
  g.shared = g.outputs + (g.both ? outputs + few : std::max(outputs, few)) * kBytes;
  return g;
}

// The first choice of which two blocks fit a processor, else the first of which one does.
template <class P>
Geometry choose_geometry(int64_t channels, int64_t value_channels, int shared_bytes) {
  struct Choice {
    int tokens, rows, stages;
  };
  constexpr Choice kChoices[] = {{128, 0, 2}, {64, 0, 2},  {64, 96, 2}, {64, 48, 2}, {32, 96, 2},
                                 {32, 48, 2}, {32, 48, 1}, {32, 32, 1}, {32, 16, 1}};
  const auto padded = [](int64_t width) { return static_cast<int>((width + 15) / 16 * 16); };
  Geometry last{};
  for (const int limit : {shared_bytes / 2 - 1024, shared_bytes}) {
    for (const Choice& choice : kChoices) {
      last = geometry<P>(padded(channels), padded(value_channels), choice.rows, choice.tokens, choice.stages);
      if (last.shared <= limit) return last;
    }
  }
  return last;
}

template <class P>
void start(const SourceGradients& problem, const Table& table, Stream stream) {
  const Limits device = limits();
  Arguments args{table, problem, 1, 0,
                 0,     0,       0, choose_geometry<P>(problem.channels, problem.value_channels, device.shared_bytes)};
  const Geometry& g = args.geometry;
  if (!g.both) {
    args.key_groups = (problem.channels + g.key_rows - 1) / g.key_rows;
    args.groups = args.key_groups + (problem.value_channels + g.value_rows - 1) / g.value_rows;
  }
  args.run = chunk_tokens(problem.longest, problem.count * problem.batch * args.groups, g.tokens, device.processors);
  args.runs = (problem.longest + args.run - 1) / args.run;
  args.works = args.groups * args.runs * problem.batch * problem.count;
  launch(source_kernel<P>, "linear_source_gradients", args.works, kThreads, static_cast<size_t>(g.shared), stream,
         args);
}

void start_source_gradients(const SourceGradients& problem, const Table& table, Stream stream) {
  if (problem.dtype == Dtype::kBFloat16)
    start<BFloat16Products>(problem, table, stream);
  else if (problem.dtype == Dtype::kFloat16 || problem.tf32)
    start<Tf32Products>(problem, table, stream);
  else
    start<IeeeProducts>(problem, table, stream);
}

bool any_of(Span<const View> views) {
  return std::any_of(views.data, views.data + views.size, [](const View& view) { return view.data != nullptr; });
}

int64_t longest_of(const std::vector<int64_t>& tokens) {
  return tokens.empty() ? 0 : *std::max_element(tokens.begin(), tokens.end());
}

}  // namespace

void linear_backward(const LinearProblem& problem, const LinearGradients& gradients, const Call& call) {
  const DeviceGuard guard(call.device);
  const EdgeList& edges = problem.edges;
  const bool sources_wanted = any_of(gradients.keys) || any_of(gradients.values);
  const bool initials_wanted = gradients.initial_s != nullptr;
  const bool sums_wanted = sources_wanted || initials_wanted;

  const int64_t outputs = gradients.grad_outputs.size;
  std::vector<View> queries;
  std::vector<int64_t> tokens, query_tokens, source_tokens;
  std::vector<std::vector<int64_t>> by_query(static_cast<size_t>(problem.queries.size)), by_source, by_output;
  for (int64_t output = 0; output < outputs; ++output) {
    const int64_t query = edges.query_of(output);
    const bool present = gradients.grad_outputs[output].data != nullptr;
    queries.push_back(problem.queries[query]);
    tokens.push_back(present ? queries.back().tokens : 0);
    if (present) by_query[static_cast<size_t>(query)].push_back(output);
    by_output.push_back({output});
  }
  size_t most = 0;
  for (const auto& members : by_query) most = std::max(most, members.size());
  for (int64_t i = 0; i < problem.queries.size; ++i) query_tokens.push_back(problem.queries[i].tokens);
  for (int64_t source = 0; source < problem.keys.size; ++source) {
    source_tokens.push_back(problem.keys[source].tokens);
    by_source.emplace_back();
    for (int64_t i = edges.source_begin[source]; i < edges.source_begin[source + 1]; ++i)
      by_source.back().push_back(edges.all[edges.by_source[i]].output);
  }

  Scratch scratch;
  TableBuilder table;
  const int gradient_rows = table.add(gradients.grad_outputs);
  QueryGradients query{problem.dtype,
                       problem.feature_map,
                       call.tf32,
                       static_cast<float>(problem.eps),
                       problem.batch,
                       problem.channels,
                       problem.value_channels,
                       problem.queries.size,
                       outputs,
                       longest_of(query_tokens),
                       static_cast<int64_t>(most),
                       table.add(problem.queries),
                       gradient_rows,
                       table.add(gradients.queries),
                       table.add_lists(by_query),
                       static_cast<const float*>(problem.state_s),
                       static_cast<const float*>(problem.state_z),
                       nullptr,
                       0};
  reserve_query_gradients(query, scratch);
  LinearStates states{problem.dtype,
                      problem.feature_map,
                      call.tf32,
                      problem.batch,
                      problem.channels,
                      problem.value_channels,
                      table.add({queries.data(), outputs}),
                      gradient_rows,
                      nullptr,
                      query.longest};
  SourceGradients source{problem.dtype,
                         problem.feature_map,
                         call.tf32,
                         problem.batch,
                         problem.channels,
                         problem.value_channels,
                         problem.keys.size,
                         longest_of(source_tokens),
                         table.add(problem.keys),
                         table.add(problem.values),
                         table.add(gradients.keys),
                         table.add(gradients.values),
                         nullptr,
                         nullptr};
  const Chunks chunks = make_chunks(tokens, problem.batch, problem.value_channels, problem.channels,
                                    linear_chunk(problem, outputs, longest_of(tokens)), table, scratch);
  const int source_lists = table.add_lists(by_source), output_lists = table.add_lists(by_output);
  const int64_t weights = scratch.reserve<float>(outputs * problem.batch * 2 * query.longest);
  const int64_t sources = problem.keys.size * problem.batch * problem.channels;
  const int64_t source_s = scratch.reserve<float>(sources * problem.value_channels);
  const int64_t source_z = scratch.reserve<float>(sources);
  table.reserve(scratch);
  scratch.allocate(call);
  const Table device_table = table.finish(scratch, call.stream);
  float* partial = scratch.at<float>(chunks.offset);
  const auto *grad_s = static_cast<const float*>(gradients.grad_state_s),
             *grad_z = static_cast<const float*>(gradients.grad_state_z);

  if (sums_wanted) query.weights = scratch.at<float>(weights);
  if (sums_wanted || any_of(gradients.queries)) start_query_gradients(query, device_table, scratch, call.stream);
  if (!sums_wanted) return;
  states.weights = query.weights;
  start_linear_states(states, device_table, chunks, partial, call.stream);
  if (initials_wanted)
    sum_states(device_table, chunks, partial,
               {output_lists, outputs, grad_s, grad_z, true, static_cast<float*>(gradients.initial_s),
                static_cast<float*>(gradients.initial_z)},
               call.stream);
  if (!sources_wanted) return;
  float *s = scratch.at<float>(source_s), *z = scratch.at<float>(source_z);
  sum_states(device_table, chunks, partial, {source_lists, problem.keys.size, grad_s, grad_z, true, s, z}, call.stream);
  source.s = s;
  source.z = z;
  start_source_gradients(source, device_table, call.stream);
}

}  // namespace xattn::cuda
