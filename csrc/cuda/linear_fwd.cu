// Linear cross-attention, forward.
//
//   S_o = sum_edges(o) sum_n v_n phi(k_n)^T    Z_o = sum_edges(o) sum_n phi(k_n)
//   out_o[:, m] = S_o phi(q_m) / max(Z_o . phi(q_m), eps)
//
// Plan: (1) partial states of chunks of every source (linear_states.cu); (2) their sums for every output
// (states.cu); (3) here: a block has rows of S in shared memory, of all outputs of a query where they fit,
// and goes through a run of the query's tokens, tile by tile, the next one on its way: a query is read and
// mapped once for its outputs. Two more rows hold Z, the second one what rounding took from the first:
// denominators are products like the rest, with the digits of float32.
#include <algorithm>

#include "linear_states.h"
#include "maths.h"
#include "operators.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 8;              // of S, each some rows of an output, that a block can have
constexpr int kRows = 3, kColumns = 4;  // tiles of a warp's product

// Sizes that a call chooses. Offsets are bytes of shared memory.
struct Geometry {
  int channels, rows, tokens, stages, pieces;  // of a tile, padded: of queries, of a piece of S, of a tile
  int z, queries, outputs, denominators, shared;
};

struct Arguments {
  Table table;
  Dtype dtype;
  FeatureMap feature_map;
  float eps;
  int queries, outputs, lists;  // in the table: views; for every query its outputs
  int64_t batch, channels, value_channels;
  int64_t row_groups, groups, runs, run, works;  // of an output's rows; of pieces; of tokens, and their length
  const float *s, *z;
  Geometry geometry;
};

template <class Products>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work) : args_(args), geometry_(args.geometry) {
    first_ = static_cast<int>(work % args.groups) * geometry_.pieces;
    work /= args.groups;
    begin_ = work % args.runs * args.run;
    work /= args.runs;
    batch_ = work % args.batch;
    const int64_t slot = work / args.batch;
    query_ = args.table.view(args.queries, slot);
    list_ = args.table[args.lists + slot];
    const int left = static_cast<int>((args.table[args.lists + slot + 1] - list_) * args.row_groups) - first_;
    count_ = left < geometry_.pieces ? left : geometry_.pieces;
    end_ = begin_ + args.run < query_.tokens ? begin_ + args.run : query_.tokens;
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_ || count_ <= 0) return;
    query_access_ = access<E>(query_, args_.dtype);
    load(0);
    load_states();
    XATTN_KEEP_LOOP
    for (int number = 0; token(number) < end_; ++number) {
      if (geometry_.stages == 2) {
        load(number + 1);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      sync_threads();
      map_queries(number);
      sync_threads();
      divide(number);
      sync_threads();
      attend(number);
      sync_threads();
      if (geometry_.stages == 1) load(number + 1);
      store(number);
    }
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

  // Of a piece: its output, the first of its rows there, how many there are.
  XATTN_DEVICE int64_t output(int piece) const {
    return args_.table[list_ + (first_ + piece) / static_cast<int>(args_.row_groups)];
  }
  XATTN_DEVICE int row(int piece) const {
    return (first_ + piece) % static_cast<int>(args_.row_groups) * geometry_.rows;
  }
  XATTN_DEVICE int rows(int piece) const {
    const int left = static_cast<int>(args_.value_channels) - row(piece);
    return left < geometry_.rows ? left : geometry_.rows;
  }

  XATTN_DEVICE int stride() const { return row_stride<P>(geometry_.channels); }
  XATTN_DEVICE Tile<E> queries(int number) const {
    const int size = tile_elements<P>(geometry_.channels, geometry_.tokens);
    return make_tile<P>(shared<E>(geometry_.queries) + number % geometry_.stages * size, query_access_.token_minor,
                        geometry_.channels, geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> outputs(int piece, bool token_minor) const {
    const int size = tile_elements<P>(geometry_.rows, geometry_.tokens);
    return make_tile<P>(shared<E>(geometry_.outputs) + piece * size, token_minor, geometry_.rows, geometry_.tokens);
  }
  // Reciprocals of a piece's denominators.
  XATTN_DEVICE float* reciprocals(int piece) const {
    return shared<float>(geometry_.denominators) + piece * geometry_.tokens;
  }

  XATTN_DEVICE void load(int number) const {
    if (token(number) < end_)
      load_tile(query_, query_access_, {batch_, 0, token(number), static_cast<int>(args_.channels), tokens(number)},
                queries(number), geometry_.channels, geometry_.tokens);
    commit_copies();
  }

  XATTN_DEVICE void load_states() const {
    const int64_t channels = args_.channels;
    XATTN_KEEP_LOOP
    for (int piece = 0; piece < count_; ++piece) {
      const int inside = rows(piece);
      const float* s =
          args_.s + ((output(piece) * args_.batch + batch_) * args_.value_channels + row(piece)) * channels;
      E* to = shared<E>(0) + piece * geometry_.rows * stride();
      for_rows(geometry_.rows, geometry_.channels, [&](int r, int channel) {
        const float x = r < inside && channel < channels ? s[r * channels + channel] : 0.0f;
        to[r * stride() + channel] = from_float<E>(x);
      });
    }
    E* to = shared<E>(geometry_.z);
    for_rows(2 * kPieces, geometry_.channels, [&](int r, int channel) {
      float x = 0.0f;
      if (r / 2 < count_ && channel < channels) {
        x = args_.z[(output(r / 2) * args_.batch + batch_) * channels + channel];
        if (r % 2 != 0) x -= rounded<P>(x);
      }
      to[r * stride() + channel] = from_float<E>(rounded<P>(x));
    });
  }

  XATTN_DEVICE void map_queries(int number) const {
    const FeatureMap name = args_.feature_map;
    const int channels = static_cast<int>(args_.channels);
    map_tile(queries(number), geometry_.channels, geometry_.tokens,
             [=](float x, int channel, int) { return channel < channels ? feature_map<P::kExact>(name, x) : 0.0f; });
  }

  XATTN_DEVICE void divide(int number) const {
    multiply_tiles<P, 1, 2>({shared<E>(geometry_.z), stride(), true}, queries(number).over_channels(), 2 * kPieces,
                            geometry_.tokens, geometry_.channels,
                            [&](int, int column, Accumulator<1, 2>& sum, int rows, int columns) {
                              sum.for_pairs(rows, columns, [&](int r, int c, float x, float y) {
                                // Both rows of a Z are those of two lanes.
                                x += shuffle_xor(x, 4);
                                y += shuffle_xor(y, 4);
                                if (r % 2 != 0 || r / 2 >= count_) return;
                                float* to = reciprocals(r / 2) + column + c;
                                to[0] = 1.0f / (x < args_.eps ? args_.eps : x);
                                to[1] = 1.0f / (y < args_.eps ? args_.eps : y);
                              });
                            });
  }

  XATTN_DEVICE void attend(int number) const {
    const Operand<E> q = queries(number).over_channels();
    const int row_tiles = (geometry_.rows + 16 * kRows - 1) / (16 * kRows);
    const int tiles = row_tiles * ((geometry_.tokens + 8 * kColumns - 1) / (8 * kColumns));
    XATTN_KEEP_LOOP
    for (int i = warp(); i < count_ * tiles; i += warp_count()) {
      const int piece = i / tiles, first = i % row_tiles * 16 * kRows;
      const int column = i % tiles / row_tiles * 8 * kColumns;
      const Operand<E> s{shared<E>(0) + piece * geometry_.rows * stride(), stride(), true};
      Accumulator<kRows, kColumns> sum;
      sum.clear();
      multiply_add<P>(sum, s, first, q, column, 0, geometry_.channels, geometry_.rows - first,
                      geometry_.tokens - column);
      const Tile<E> out = outputs(piece, is_token_minor(args_.table.view(args_.outputs, output(piece))));
      const float* d = reciprocals(piece) + column;
      sum.for_pairs(geometry_.rows - first, geometry_.tokens - column, [&](int r, int c, float x, float y) {
        put_pair(out, first + r, column + c, x * d[c], y * d[c + 1]);
      });
    }
  }

  XATTN_DEVICE void store(int number) const {
    XATTN_KEEP_LOOP
    for (int piece = 0; piece < count_; ++piece) {
      const View view = args_.table.view(args_.outputs, output(piece));
      const Access how = access<E>(view, args_.dtype);
      store_tile(view, how, {batch_, row(piece), token(number), rows(piece), tokens(number)},
                 outputs(piece, how.token_minor));
    }
  }

  const Arguments& args_;
  const Geometry& geometry_;
  View query_;
  Access query_access_;
  int64_t batch_, begin_, end_, list_;
  int first_, count_;
};

template <class P>
XATTN_KERNEL(kThreads, 2)
output_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P>(args, work).run();
}

template <class P>
Geometry geometry(int channels, int rows, int tokens, int stages, int pieces) {
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element)), kFloat = static_cast<int>(sizeof(float));
  Geometry g{channels, rows, tokens, stages, pieces, 0, 0, 0, 0, 0};
  g.z = pieces * rows * row_stride<P>(channels) * kBytes;
  g.queries = g.z + 2 * kPieces * row_stride<P>(channels) * kBytes;
  g.outputs = g.queries + stages * tile_elements<P>(channels, tokens) * kBytes;
  g.denominators = g.outputs + pieces * tile_elements<P>(rows, tokens) * kBytes;
  g.shared = g.denominators + pieces * tokens * kFloat;
  return g;
}

// The first choice of which two blocks fit a processor, else the first of which one does. `most`: outputs of
// a query.
template <class P>
Geometry choose_geometry(int64_t channels, int64_t value_channels, int64_t most, int shared_bytes) {
  struct Choice {
    bool all;
    int tokens, rows, stages;
  };
  constexpr Choice kChoices[] = {{true, 128, 96, 2}, {true, 64, 96, 2},  {false, 128, 96, 2}, {false, 128, 48, 2},
                                 {false, 64, 96, 2}, {false, 64, 48, 2}, {false, 32, 96, 2},  {false, 32, 48, 2},
                                 {false, 32, 48, 1}, {false, 32, 32, 1}, {false, 32, 16, 1},  {false, 16, 16, 1}};
  const auto padded = [](int64_t width) { return static_cast<int>((width + 15) / 16 * 16); };
  Geometry last{};
  for (const int limit : {shared_bytes / 2 - 1024, shared_bytes}) {
    for (const Choice& choice : kChoices) {
      const int rows = std::min(choice.rows, padded(value_channels));
      const int64_t pieces = choice.all ? most * ((value_channels + rows - 1) / rows) : 1;
      last = geometry<P>(padded(channels), rows, choice.tokens, choice.stages,
                         static_cast<int>(std::clamp<int64_t>(pieces, 1, kPieces)));
      if (last.shared <= limit) return last;
    }
  }
  return last;
}

template <class P>
void start_outputs(Arguments args, int64_t queries, int64_t most, int64_t longest, Stream stream) {
  const Limits device = limits();
  args.geometry = choose_geometry<P>(args.channels, args.value_channels, most, device.shared_bytes);
  args.row_groups = (args.value_channels + args.geometry.rows - 1) / args.geometry.rows;
  args.groups = (most * args.row_groups + args.geometry.pieces - 1) / args.geometry.pieces;
  args.run = chunk_tokens(longest, queries * args.batch * args.groups, args.geometry.tokens, device.processors);
  args.runs = (longest + args.run - 1) / args.run;
  args.works = args.groups * args.runs * args.batch * queries;
  launch(output_kernel<P>, "linear_outputs", args.works, kThreads, static_cast<size_t>(args.geometry.shared), stream,
         args);
}

}  // namespace

void linear_forward(const LinearProblem& problem, const Call& call) {
  const DeviceGuard guard(call.device);
  Scratch scratch;
  TableBuilder table;
  std::vector<std::vector<int64_t>> sources, outputs(static_cast<size_t>(problem.queries.size));
  for (int64_t output = 0; output < problem.outputs.size; ++output) {
    outputs[static_cast<size_t>(problem.edges.query_of(output))].push_back(output);
    sources.emplace_back();
    for (int64_t e = problem.edges.output_begin[output]; e < problem.edges.output_begin[output + 1]; ++e)
      sources.back().push_back(problem.edges.all[e].source);
  }
  size_t most = 0;
  int64_t longest = 0, longest_source = 0;
  for (int64_t slot = 0; slot < problem.queries.size; ++slot) {
    most = std::max(most, outputs[static_cast<size_t>(slot)].size());
    longest = std::max(longest, problem.queries[slot].tokens);
  }
  std::vector<int64_t> tokens;
  for (int64_t slot = 0; slot < problem.keys.size; ++slot) {
    tokens.push_back(problem.keys[slot].tokens);
    longest_source = std::max(longest_source, tokens.back());
  }
  const int query_rows = table.add(problem.queries), output_rows = table.add(problem.outputs);
  const int output_lists = table.add_lists(outputs);
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
                       output_lists,
                       problem.batch,
                       problem.channels,
                       problem.value_channels,
                       0,
                       0,
                       0,
                       0,
                       0,
                       s,
                       z,
                       {}};
  if (problem.dtype == Dtype::kBFloat16)
    start_outputs<BFloat16Products>(args, problem.queries.size, static_cast<int64_t>(most), longest, call.stream);
  else if (problem.dtype == Dtype::kFloat16 || call.tf32)
    start_outputs<Tf32Products>(args, problem.queries.size, static_cast<int64_t>(most), longest, call.stream);
  else
    start_outputs<IeeeProducts>(args, problem.queries.size, static_cast<int64_t>(most), longest, call.stream);
}

}  // namespace xattn::cuda
