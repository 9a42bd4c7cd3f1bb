// Gradients of the queries of linear cross-attention. For token m of an output with gradient g:
//
//   d = max(Z . phi(q), eps)    c = g . out (0 where the clamp is active)
//   dphi(q) = sum_outputs (S^T g - c Z) / d    dq = dphi(q) phi'(q)
//
// S^T g and c Z nearly cancel where keys hardly differ, the more so the shorter operands are rounded. So
// operands are made of S - m Z^T, about the mean output m = S 1 / Z 1: with h = (S - m Z^T)^T g,
// c = (h . phi(q)) / d + m . g and S^T g - c Z = h - (h . phi(q)) / d Z. Two more columns hold m in two
// parts, of which the second is what rounding took from the first: the product gives m . g with them.
//
// Plan: (1) these operands, once for all tokens; (2) a block goes through a run of a query's tokens, tile by
// tile. A warp has 48 channels of some tokens: h of an output and the sum over outputs are in its registers.
// Operands stay in shared memory where those of all outputs fit, else they come with the gradients.
#include <algorithm>

#include "linear_bwd.h"
#include "maths.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kRows = 48;  // channels of a warp
constexpr int kNarrowThreads = 256, kMostThreads = 288;
constexpr int kPrepareThreads = 256;

XATTN_BOTH constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

// Operands of outputs in scratch memory: (outputs, batch, padded(value_channels), columns), and Z beside.
struct Operands {
  char* s;
  float* z;
};

struct Geometry {
  int rows, channels, values;                       // columns of operands; widths; all padded
  int tokens, step, row_warps;                      // of a tile; value channels of a product; warps beside each other
  int members, stages;                              // outputs whose operands stay, or 0; tiles of queries
  int states, z, gradients, queries, sums, shared;  // offsets in shared memory
};

struct Arguments {
  Table table;
  QueryGradients problem;
  Operands operands;
  int64_t runs, run, works;
  Geometry geometry;
};

struct PrepareArguments {
  Operands operands;
  const float *s, *z;
  int64_t batch, channels, value_channels, rows, values, groups, works;
};

XATTN_DEVICE float sum_of_warp(float x) {
  XATTN_UNROLL
  for (int i = kWarp / 2; i > 0; i /= 2) x += shuffle_xor(x, i);
  return x;
}

// A warp has a row of S.
template <class P>
XATTN_KERNEL(kPrepareThreads, 1)
prepare_kernel(XATTN_PARAMETER PrepareArguments args) {
  using E = typename P::Element;
  const int channels = static_cast<int>(args.channels), rows = static_cast<int>(args.rows);
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) {
    const int64_t state = work / args.groups;
    const int value = static_cast<int>(work % args.groups) * (kPrepareThreads / kWarp) + warp();
    const float* z = args.z + state * channels;
    if (work % args.groups == 0)
      for (int c = thread_index(); c < rows; c += kPrepareThreads)
        args.operands.z[state * rows + c] = c < channels ? z[c] : 0.0f;
    if (value >= args.values) continue;
    const bool inside = value < args.value_channels;
    const float* s = args.s + (state * args.value_channels + (inside ? value : 0)) * channels;
    float total = 0.0f, size = 0.0f, sum = 0.0f;
    for (int c = lane(); c < channels; c += kWarp) {
      total += z[c];
      size += z[c] < 0.0f ? -z[c] : z[c];
      sum += s[c];
    }
    total = sum_of_warp(total);
    size = sum_of_warp(size);
    // Any m is right; where Z nearly sums to 0 it would be large, and is left out.
    const float mean = total > 0.5f * size ? sum_of_warp(sum) / total : 0.0f;
    const float high = rounded<P>(mean);
    E* to = reinterpret_cast<E*>(args.operands.s) + (state * args.values + value) * rows;
    for (int c = lane(); c < rows; c += kWarp) {
      const float x = c < channels ? s[c] - mean * z[c] : c == channels ? high : c == channels + 1 ? mean - high : 0.0f;
      to[c] = from_float<E>(inside ? x : 0.0f);
    }
  }
}

template <class Products, int kColumns>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work)
      : args_(args), problem_(args.problem), geometry_(args.geometry) {
    begin_ = work % args.runs * args.run;
    work /= args.runs;
    batch_ = work % problem_.batch;
    slot_ = work / problem_.batch;
    query_ = args.table.view(problem_.queries, slot_);
    result_ = args.table.view(problem_.results, slot_);
    end_ = begin_ + args.run < query_.tokens ? begin_ + args.run : query_.tokens;
    list_ = args.table[problem_.lists + slot_];
    members_ = static_cast<int>(args.table[problem_.lists + slot_ + 1] - list_);
    chunks_ = (geometry_.values + geometry_.step - 1) / geometry_.step;
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_ || (members_ == 0 && result_.data == nullptr)) return;
    tiles_ = static_cast<int>((end_ - begin_ + geometry_.tokens - 1) / geometry_.tokens);
    query_access_ = access<E>(query_, problem_.dtype);
    result_access_ = access<E>(result_, problem_.dtype);
    if (geometry_.members > 0) load_all_states();
    if (geometry_.stages == 2) load_query(0);
    load(0, 0, 0, 0);
    int item = 0;
    XATTN_KEEP_LOOP
    for (int tile = 0; tile < tiles_; ++tile) {
      if (geometry_.stages == 1) {
        load_query(tile);
        commit_copies();
      }
      sum_.clear();
      XATTN_KEEP_LOOP
      for (int member = 0; member < members_ || member == 0; ++member) {
        product_.clear();
        XATTN_KEEP_LOOP
        for (int chunk = 0; chunk < chunks_; ++chunk, ++item) {
          load_next(tile, member, chunk, item + 1);
          const bool first = member == 0 && chunk == 0;
          if (first && geometry_.stages == 1)
            wait_copies<0>();
          else
            wait_copies<1>();
          sync_threads();
          if (first) {
            map_query(tile);
            sync_threads();
          }
          if (member < members_) multiply(member, chunk, item);
          sync_threads();
        }
        if (member < members_) add_output(tile, member);
      }
      if (result_.data != nullptr) store(tile);
    }
    wait_copies<0>();
    sync_threads();
  }

 private:
  template <class T>
  static XATTN_DEVICE T* shared(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  XATTN_DEVICE int64_t token(int tile) const { return begin_ + static_cast<int64_t>(tile) * geometry_.tokens; }
  XATTN_DEVICE int tokens(int tile) const {
    const int64_t left = end_ - token(tile);
    return left < geometry_.tokens ? static_cast<int>(left) : geometry_.tokens;
  }
  XATTN_DEVICE int64_t output(int member) const { return args_.table[list_ + member]; }

  XATTN_DEVICE Tile<E> query(int tile, const Access& access) const {
    const int size = tile_elements<P>(geometry_.channels, geometry_.tokens);
    return make_tile<P>(shared<E>(geometry_.queries) + tile % geometry_.stages * size, access.token_minor,
                        geometry_.channels, geometry_.tokens);
  }
  XATTN_DEVICE Tile<E> gradient(int item, const Access& access) const {
    const int size = tile_elements<P>(geometry_.step, geometry_.tokens);
    return make_tile<P>(shared<E>(geometry_.gradients) + item % 2 * size, access.token_minor, geometry_.step,
                        geometry_.tokens);
  }
  // Operand and Z of a member. While Z of one comes, some threads may be at the one before the last.
  XATTN_DEVICE E* state(int member, int chunk, int item) const {
    const int row =
        geometry_.members > 0 ? member * geometry_.values + chunk * geometry_.step : item % 2 * geometry_.step;
    return shared<E>(geometry_.states) + row * row_stride<P>(geometry_.rows);
  }
  XATTN_DEVICE float* z(int tile, int member) const {
    const int place = geometry_.members > 0 ? member : (tile * members_ + member) % 3;
    return shared<float>(geometry_.z) + place * geometry_.rows;
  }
  XATTN_DEVICE int depth(int chunk) const {
    const int left = geometry_.values - chunk * geometry_.step;
    return left < geometry_.step ? left : geometry_.step;
  }

  XATTN_DEVICE void load_query(int tile) const {
    if (tile < tiles_)
      load_tile(query_, query_access_, {batch_, 0, token(tile), static_cast<int>(problem_.channels), tokens(tile)},
                query(tile, query_access_), geometry_.channels, geometry_.tokens);
  }
  XATTN_DEVICE void load_all_states() const {
    XATTN_KEEP_LOOP
    for (int member = 0; member < members_; ++member) {
      load_state(member, 0, geometry_.values, state(member, 0, 0));
      load_z(0, member);
    }
  }
  XATTN_DEVICE void load_state(int member, int value, int count, E* to) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(E));
    const int64_t number = output(member) * problem_.batch + batch_;
    const E* from = reinterpret_cast<const E*>(args_.operands.s) + (number * geometry_.values + value) * geometry_.rows;
    const int stride = row_stride<P>(geometry_.rows), rows = geometry_.rows;
    for_rows(count, rows / kPer,
             [=](int row, int i) { copy_async(to + row * stride + i * kPer, from + row * rows + i * kPer); });
  }
  XATTN_DEVICE void load_z(int tile, int member) const {
    const float* from = args_.operands.z + (output(member) * problem_.batch + batch_) * geometry_.rows;
    float* to = z(tile, member);
    for (int i = 4 * thread_index(); i < geometry_.rows; i += 4 * thread_count()) copy_async(to + i, from + i);
  }

  // What comes after an item, to be ready when its turn comes; the next tile's queries with its first one.
  XATTN_DEVICE void load_next(int tile, int member, int chunk, int item) const {
    if (++chunk == chunks_) {
      chunk = 0;
      if (++member >= members_) {
        member = 0;
        ++tile;
        if (geometry_.stages == 2) load_query(tile);
      }
    }
    if (tile < tiles_) return load(tile, member, chunk, item);
    commit_copies();
  }
  XATTN_DEVICE void load(int tile, int member, int chunk, int item) const {
    if (member < members_) {
      const View view = args_.table.view(problem_.gradients, output(member));
      const Access how = access<E>(view, problem_.dtype);
      const int value = chunk * geometry_.step, left = static_cast<int>(problem_.value_channels) - value;
      const int count = left < geometry_.step ? left : geometry_.step;
      load_tile(view, how, {batch_, value, token(tile), count, tokens(tile)}, gradient(item, how), depth(chunk),
                geometry_.tokens);
      if (geometry_.members == 0) {
        load_state(member, value, depth(chunk), state(member, chunk, item));
        if (chunk == 0) load_z(tile, member);
      }
    }
    commit_copies();
  }

  XATTN_DEVICE void map_query(int tile) const {
    const FeatureMap name = problem_.feature_map;
    const int channels = static_cast<int>(problem_.channels);
    map_tile(query(tile, query_access_), geometry_.channels, geometry_.tokens,
             [=](float x, int channel, int) { return channel < channels ? feature_map<P::kExact>(name, x) : 0.0f; });
  }

  XATTN_DEVICE void multiply(int member, int chunk, int item) {
    const View view = args_.table.view(problem_.gradients, output(member));
    const Operand<E> left{state(member, chunk, item), row_stride<P>(geometry_.rows), false};
    const Operand<E> right = gradient(item, access<E>(view, problem_.dtype)).over_channels();
    multiply_add<P>(product_, left, row_of_warp(), right, column_of_warp(), 0, depth(chunk),
                    geometry_.rows - row_of_warp());
  }

  // Calls body(m, n, i, row, phi(q)) for the elements of a lane; those that only fill a tile are zero.
  template <class Body>
  XATTN_DEVICE void for_elements(int tile, const Body& body) const {
    XATTN_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      if (row_of_warp() + 16 * m >= geometry_.channels) continue;
      const Elements<E, kColumns> q(query(tile, query_access_), row_of_warp() + 16 * m, column_of_warp());
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int row = row_of_warp() + 16 * m + i / 2 * 8 + lane() / 4;
        XATTN_UNROLL
        for (int n = 0; n < kColumns; ++n) body(m, n, i, row, q.at(n, i / 2, i % 2));
      }
    }
  }

  // Adds (h - (h . phi(q)) / d Z) / d of an output to the sum.
  XATTN_DEVICE void add_output(int tile, int member) {
    const float* state_z = z(tile, member);
    float denominator[kColumns][2], along[kColumns][2];
    XATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      XATTN_UNROLL
      for (int i = 0; i < 2; ++i) denominator[n][i] = along[n][i] = 0.0f;
    }
    for_elements(tile, [&](int m, int n, int i, int row, float x) {
      denominator[n][i % 2] = fused_multiply_add(state_z[row], x, denominator[n][i % 2]);
      along[n][i % 2] = fused_multiply_add(product_.v[m][n][i], x, along[n][i % 2]);
    });
    // For every token: sums of d and of h . phi(q) by rows of warps, and both parts of m . g.
    float* sums = shared<float>(geometry_.sums);
    float* means = sums + 2 * geometry_.row_warps * geometry_.tokens;
    const int g = lane() / 4, t = lane() % 4, row_warp = row_of_warp() / kRows;
    XATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      XATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        XATTN_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) {
          denominator[n][i] += shuffle_xor(denominator[n][i], mask);
          along[n][i] += shuffle_xor(along[n][i], mask);
        }
        const int column = column_of_warp() + 8 * n + 2 * t + i;
        if (g == 0) {
          sums[2 * row_warp * geometry_.tokens + column] = denominator[n][i];
          sums[(2 * row_warp + 1) * geometry_.tokens + column] = along[n][i];
        }
        XATTN_UNROLL
        for (int m = 0; m < kRows / 16; ++m) {
          XATTN_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int part = row_of_warp() + 16 * m + 8 * half + g - static_cast<int>(problem_.channels);
            if (part == 0 || part == 1) means[part * geometry_.tokens + column] = product_.v[m][n][2 * half + i];
          }
        }
      }
    }
    sync_threads();
    XATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      XATTN_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int column = column_of_warp() + 8 * n + 2 * t + i;
        float d = 0.0f, sum = 0.0f;
        XATTN_KEEP_LOOP
        for (int r = 0; r < geometry_.row_warps; ++r) {
          d += sums[2 * r * geometry_.tokens + column];
          sum += sums[(2 * r + 1) * geometry_.tokens + column];
        }
        const float mean = means[column] + means[geometry_.tokens + column];
        const bool clamped = d < problem_.eps;
        const float w = 1.0f / (clamped ? problem_.eps : d);
        sum = clamped ? -mean : sum * w;
        if (problem_.weights != nullptr && row_warp == 0 && g == 0 && column < tokens(tile)) {
          float* to = problem_.weights + (output(member) * problem_.batch + batch_) * 2 * problem_.longest +
                      token(tile) + column;
          to[0] = w;
          to[problem_.longest] = clamped ? 0.0f : -(sum + mean);
        }
        denominator[n][i] = w;
        along[n][i] = sum;
      }
    }
    XATTN_UNROLL
    for (int m = 0; m < kRows / 16; ++m) {
      if (row_of_warp() + 16 * m >= geometry_.channels) continue;
      XATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float of_row = state_z[row_of_warp() + 16 * m + i / 2 * 8 + g];
        XATTN_UNROLL
        for (int n = 0; n < kColumns; ++n)
          sum_.v[m][n][i] += (product_.v[m][n][i] - along[n][i % 2] * of_row) * denominator[n][i % 2];
      }
    }
  }

  // The sum by phi', in place of the queries and as the result lies in memory.
  XATTN_DEVICE void store(int tile) {
    for_elements(tile, [&](int m, int n, int i, int, float x) {
      sum_.v[m][n][i] *= feature_map_slope<P::kExact>(problem_.feature_map, x);
    });
    sync_threads();
    const Tile<E> to = query(tile, result_access_);
    const int channels = static_cast<int>(problem_.channels), first = row_of_warp(), column = column_of_warp();
    sum_.for_pairs(geometry_.channels - first, 8 * kColumns, [&](int row, int n, float x, float y) {
      if (first + row < channels) put_pair(to, first + row, column + n, x, y);
    });
    sync_threads();
    store_tile(result_, result_access_, {batch_, 0, token(tile), channels, tokens(tile)}, to);
    sync_threads();
  }

  XATTN_DEVICE int row_of_warp() const { return warp() % geometry_.row_warps * kRows; }
  XATTN_DEVICE int column_of_warp() const { return warp() / geometry_.row_warps * 8 * kColumns; }

  const Arguments& args_;
  const QueryGradients& problem_;
  const Geometry& geometry_;
  View query_, result_;
  Access query_access_, result_access_;
  int64_t slot_, batch_, begin_, end_, list_;
  int members_, chunks_, tiles_;
  Accumulator<kRows / 16, kColumns> product_, sum_;
};

// kNarrow: all channels are those of one warp. Nine warps, which the widest take, leave 168 registers each.
template <class P, int kColumns, bool kNarrow>
XATTN_KERNEL(kNarrow ? kNarrowThreads : kMostThreads, kNarrow ? 2 : 1)
query_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P, kColumns>(args, work).run();
}

template <class P>
Geometry geometry(const QueryGradients& problem, int columns, int token_warps, int members, int step, int stages) {
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element)), kFloat = static_cast<int>(sizeof(float));
  Geometry g{};
  g.rows = static_cast<int>(padded(problem.channels + 2));
  g.channels = static_cast<int>(padded(problem.channels));
  g.values = static_cast<int>(padded(problem.value_channels));
  g.tokens = 8 * columns * token_warps;
  g.step = std::min(step, g.values);
  g.row_warps = (g.rows + kRows - 1) / kRows;
  g.members = members;
  g.stages = stages;
  g.z = (members > 0 ? members * g.values : 2 * g.step) * row_stride<P>(g.rows) * kBytes;
  g.gradients = g.z + (members > 0 ? members : 3) * g.rows * kFloat;
  g.queries = g.gradients + 2 * tile_elements<P>(g.step, g.tokens) * kBytes;
  g.sums = g.queries + stages * tile_elements<P>(g.channels, g.tokens) * kBytes;
  g.shared = g.sums + 2 * (g.row_warps + 1) * g.tokens * kFloat;
  return g;
}

// The first choice of which two blocks fit a processor, else the first of which one does.
template <class P>
Geometry choose_geometry(const QueryGradients& problem, int columns, int shared_bytes) {
  struct Choice {
    bool stay;
    int divisor, step, stages;
  };
  constexpr Choice kChoices[] = {{true, 1, 48, 2},  {true, 2, 48, 2},  {false, 1, 48, 2}, {false, 1, 32, 2},
                                 {false, 2, 48, 2}, {false, 2, 32, 2}, {false, 2, 16, 2}, {false, 2, 16, 1}};
  const int row_warps = static_cast<int>((padded(problem.channels + 2) + kRows - 1) / kRows);
  const int token_warps = std::max(1, 8 / row_warps);
  Geometry last{};
  for (const int limit : {shared_bytes / 2 - 1024, shared_bytes}) {
    for (const Choice& choice : kChoices) {
      const int members = choice.stay ? static_cast<int>(std::max<int64_t>(problem.most, 1)) : 0;
      last =
          geometry<P>(problem, columns, std::max(1, token_warps / choice.divisor), members, choice.step, choice.stages);
      if (last.shared <= limit) return last;
    }
  }
  return last;
}

template <class P>
void start(const QueryGradients& problem, const Table& table, const Operands& operands, Stream stream) {
  const int64_t rows = padded(problem.channels + 2), values = padded(problem.value_channels);
  const int64_t groups = (values + kPrepareThreads / kWarp - 1) / (kPrepareThreads / kWarp);
  const PrepareArguments prepare{operands,
                                 problem.s,
                                 problem.z,
                                 problem.batch,
                                 problem.channels,
                                 problem.value_channels,
                                 rows,
                                 values,
                                 groups,
                                 groups * problem.outputs * problem.batch};
  launch(prepare_kernel<P>, "linear_prepare", prepare.works, kPrepareThreads, 0, stream, prepare);

  const Limits device = limits();
  // A few tokens at a time where channels are few, for more warps, and of float, which takes twice the room.
  constexpr int kWide = sizeof(typename P::Element) == 2 ? 4 : 2;
  const bool narrow = rows <= kRows;
  const int columns = narrow ? 2 : kWide;
  Arguments args{table, problem, operands, 0, 0, 0, choose_geometry<P>(problem, columns, device.shared_bytes)};
  const Geometry& g = args.geometry;
  args.run = chunk_tokens(problem.longest, problem.count * problem.batch, g.tokens, device.processors);
  args.runs = (problem.longest + args.run - 1) / args.run;
  args.works = args.runs * problem.batch * problem.count;
  launch(narrow ? query_kernel<P, 2, true> : query_kernel<P, kWide, false>, "linear_query_gradients", args.works,
         g.tokens / (8 * columns) * g.row_warps * kWarp, static_cast<size_t>(g.shared), stream, args);
}

int64_t state_elements(const QueryGradients& problem) {
  return problem.outputs * problem.batch * padded(problem.value_channels) * padded(problem.channels + 2);
}

}  // namespace

void reserve_query_gradients(QueryGradients& problem, Scratch& scratch) {
  const int64_t z = problem.outputs * problem.batch * padded(problem.channels + 2);
  problem.offset = scratch.reserve<float>(z + state_elements(problem));
}

void start_query_gradients(const QueryGradients& problem, const Table& table, const Scratch& scratch, Stream stream) {
  float* memory = scratch.at<float>(problem.offset);
  const Operands operands{reinterpret_cast<char*>(memory), memory + state_elements(problem)};
  if (problem.dtype == Dtype::kBFloat16)
    start<BFloat16Products>(problem, table, operands, stream);
  else if (problem.dtype == Dtype::kFloat16 || problem.tf32)
    start<Tf32Products>(problem, table, operands, stream);
  else
    start<IeeeProducts>(problem, table, operands, stream);
}

}  // namespace xattn::cuda
