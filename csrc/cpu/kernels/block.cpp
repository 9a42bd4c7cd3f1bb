// The cross-attention block for inference: projections and linear attention of all edges in two passes.
//
// Source pass: a tile of a source map is read once and feeds the key and value projections of all its
// edges, whose states are added up:  h = relu(W_k1 x),  k = softplus(W_k2 h),  v = relu(W_v x),
// S^T += k v^T,  Z += k.  Target pass: a tile of a target map is read once and feeds its query
// projections:  h = relu(W_q1 x),  q = softplus(W_q2 h),  out = S q / max(Z . q, eps), written straight
// to its consumer.  Nothing of the size of a feature map is stored but the outputs.
//
// Edges with the same source and weight share a state, edges with the same query and weight a
// projection. Matrix layouts: x, h and q are panels of tokens, channels as rows. The state's product sums
// over tokens: it broadcasts k, whose rows are channels, and takes v with tokens as rows.
#include "../math.h"
#include "../pack.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

enum Projection : int { kQuery1, kQuery2, kKey1, kKey2, kValue, kProjections };

constexpr int64_t kTileBytes = 96 * 1024;   // of one matrix of a tile
constexpr int64_t kEnoughTasks = 32;        // below this many, edges of a source become tasks of their own
constexpr int64_t kLayoutHeader = 64;       // bytes before the packed weights, holding their layout's number

// Folded weights of one projection set: five k-major matrices in panels, then five biases.
template <class Op>
struct PackedWeights {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  int64_t channels;
  int64_t depth() const { return ceil_div(channels, Op::kDepth); }
  int64_t padded() const { return round_up(channels, kPanel<Op>); }
  int64_t bytes() const {
    return round_up(kProjections * padded() * (depth() * int64_t(sizeof(Unit)) + int64_t(sizeof(Real))), 64);
  }
  static constexpr int64_t layout() { return kVectorBytes * 1000 + int64_t(sizeof(Real)) * 10 + Op::kDepth; }
  template <class Byte>
  Byte* set(Byte* packed, int64_t weight) const {
    return packed + kLayoutHeader + weight * bytes();
  }
  Panels<const Unit> matrix(const char* set, int projection) const {
    return panelled<Op>(reinterpret_cast<const Unit*>(set) + projection * padded() * depth(), depth());
  }
  const Real* bias(const char* set, int projection) const {
    return reinterpret_cast<const Real*>(set + kProjections * padded() * depth() * int64_t(sizeof(Unit))) +
           projection * padded();
  }
};

template <class Op>
typename Op::Unit make_unit(const typename Op::Real* values) {
  if constexpr (Op::kDepth == 1) {
    return values[0];
  } else {
    return from_float<BFloat16>(values[0]).bits | static_cast<uint32_t>(from_float<BFloat16>(values[1]).bits) << 16;
  }
}

template <class Op>
void pack(int64_t channels, int64_t weights, const void* weight_data, const void* bias_data, void* packed_data) {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  const PackedWeights<Op> layout{channels};
  char* packed = static_cast<char*>(packed_data);
  std::memset(packed, 0, static_cast<size_t>(kLayoutHeader + weights * layout.bytes()));
  const int64_t number = layout.layout();
  std::memcpy(packed, &number, sizeof(number));
  const Real *weight = static_cast<const Real*>(weight_data), *bias = static_cast<const Real*>(bias_data);
  for (int64_t w = 0; w < weights; ++w) {
    char* set = layout.set(packed, w);
    for (int i = 0; i < kProjections; ++i, weight += channels * channels, bias += channels) {
      Unit* matrix = const_cast<Unit*>(layout.matrix(set, i).data);
      for (int64_t m = 0; m < channels; ++m) {
        for (int64_t k = 0; k < layout.depth(); ++k) {
          Real values[2] = {weight[m * channels + k * Op::kDepth], Real(0)};
          if (Op::kDepth == 2 && k * 2 + 1 < channels) values[1] = weight[m * channels + k * 2 + 1];
          matrix[m / kPanel<Op> * layout.depth() * kPanel<Op> + k * kPanel<Op> + m % kPanel<Op>] =
              make_unit<Op>(values);
        }
      }
      std::memcpy(const_cast<Real*>(layout.bias(set, i)), bias, sizeof(Real) * static_cast<size_t>(channels));
    }
  }
}

template <class Op>
Vec<typename Op::Real> activation(Vec<typename Op::Real> x) {
  if constexpr (Op::kDepth == 2) {
    return softplus_for_bfloat16(x);
  } else {
    return softplus(x);
  }
}

// Channels of a token tile as the k-major operand of the projections.
template <class Op>
void load_features(Dtype dtype, const View& view, int64_t b, int64_t t, int64_t count, int64_t channels,
                   typename Op::Unit* to) {
  const int64_t depth = ceil_div(channels, Op::kDepth);
  if constexpr (Op::kDepth == 1) {
    load_channels<Op>(dtype, view, b, t, count, 0, channels, panelled<Op>(to, depth));
  } else {
    const uint16_t* base = reinterpret_cast<const uint16_t*>(view.data) + b * view.batch_stride + t * view.token_stride;
    for (int64_t k = 0; k < depth; ++k) {
      const bool last = 2 * k + 1 == channels;
      const uint16_t* even = base + 2 * k * view.channel_stride;
      const uint16_t* odd = last ? even : even + view.channel_stride;
      const uint32_t keep = last ? 0 : 0xFFFF;
      for (int64_t n = 0; n < count; n += kPanel<Op>) {
        const int64_t width = min64(count - n, kPanel<Op>);
        uint32_t* row = to + n * depth + k * kPanel<Op>;
        if (view.token_stride == 1) {
          for (int64_t i = 0; i < width; ++i) row[i] = even[n + i] | (odd[n + i] & keep) << 16;
        } else {
          for (int64_t i = 0; i < width; ++i) {
            const int64_t at = (n + i) * view.token_stride;
            row[i] = even[at] | (odd[at] & keep) << 16;
          }
        }
        for (int64_t i = width; i < round_up(width, kLanes<float>); ++i) row[i] = 0;
      }
    }
  }
}

// Length of a channel's row of keys: the vectors of a unit's depth together.
template <class Op>
int64_t token_row(int64_t tokens) {
  return round_up(tokens, kLanes<typename Op::Real> * Op::kDepth);
}

template <class Op>
struct Buffers {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  Unit *x, *hidden, *operand, *value;
  Real *real, *result, *denominator;
  Buffers(Arena& arena, int64_t tokens, int64_t channels) {
    const int64_t rows = round_up(tokens, kPanel<Op>), row = max64(row_length<Op>(channels), channels);
    x = arena.take<Unit>(rows * ceil_div(channels, Op::kDepth));
    hidden = arena.take<Unit>(rows * ceil_div(channels, Op::kDepth));
    real = arena.take<Real>(token_row<Op>(rows) * channels);
    // Activated keys or queries as an operand: where units are single reals, the reals themselves.
    operand = Op::kDepth == 1 ? reinterpret_cast<Unit*>(real) : arena.take<Unit>(token_row<Op>(rows) * ceil_div(channels, Op::kDepth));
    value = arena.take<Unit>(rows / Op::kDepth * row);
    // The target pass has no values; where they are as large as its result, that takes their room.
    result = Op::kDepth == 1 ? reinterpret_cast<Real*>(value) : arena.take<Real>(rows * channels);
    denominator = arena.take<Real>(rows);
  }
};

// The distinct (slot, weight) pairs of one side of the edges, sorted by slot.
struct Pairs {
  int64_t *slot, *weight, *of_edge;
  int64_t count = 0;
  Pairs(Arena& arena, int64_t edges)
      : slot(arena.take<int64_t>(edges)), weight(arena.take<int64_t>(edges)), of_edge(arena.take<int64_t>(edges)) {}
  int64_t of(int64_t s) const {
    int64_t pairs = 0;
    for (int64_t i = 0; i < count; ++i) pairs += slot[i] == s;
    return pairs;
  }
  void collect(Span<const Edge> edges, int64_t Edge::*side, int64_t slots) {
    for (int64_t s = 0; s < slots; ++s) {
      for (int64_t e = 0; e < edges.size; ++e) {
        if (edges[e].*side != s) continue;
        int64_t i = count;
        while (i > 0 && slot[i - 1] == s && weight[i - 1] != edges[e].weight) --i;
        const bool known = i > 0 && slot[i - 1] == s;
        of_edge[e] = known ? i - 1 : count;
        if (known) continue;
        slot[count] = s;
        weight[count++] = edges[e].weight;
      }
    }
  }
};

struct Plan {
  Pairs sources, queries;
  Plan(Arena& arena, int64_t edges) : sources(arena, edges), queries(arena, edges) {}
};

template <class Op>
class Block {
 public:
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;

  Block(const BlockProblem& problem, int threads)
      : p_(problem),
        threads_(threads),
        weights_{problem.channels},
        row_(row_length<Op>(problem.channels)),
        state_size_(round_up(problem.channels * row_ + row_, 16)),
        tile_(tile_tokens<Op>(problem.channels, kTileBytes)),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Buffers<Op>>(tile_, problem.channels)), 64)),
        plan_memory_(bytes_of<Plan>(problem.edges.size)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))),
        plan_(make_plan()) {}

  void run() {
    const Pairs& sources = plan_.sources;
    Scratch state_memory(sizeof(Real) * static_cast<size_t>(first_state(sources.count) * state_size_));
    states_ = reinterpret_cast<Real*>(state_memory.data());
    int64_t pieces = 0;
    for (int64_t j = 0; j < p_.features.size; ++j) pieces += p_.batch * splits(j);
    if (pieces >= kEnoughTasks) {
      parallel_for(pieces, threads_, [&](int64_t index, int worker) {
        int64_t j = 0;
        while (index >= p_.batch * splits(j)) index -= p_.batch * splits(j++);
        int64_t first = 0, last = 0;
        while (first < sources.count && sources.slot[first] < j) ++first;
        for (last = first; last < sources.count && sources.slot[last] == j;) ++last;
        source_pass(j, index / splits(j), index % splits(j), first, last, tile(worker));
      });
    } else {
      parallel_for(first_state(sources.count), threads_, [&](int64_t index, int worker) {
        int64_t i = 0;
        while (index >= p_.batch * splits(sources.slot[i])) index -= p_.batch * splits(sources.slot[i++]);
        const int64_t j = sources.slot[i];
        source_pass(j, index / splits(j), index % splits(j), i, i + 1, tile(worker));
      });
    }
    Scratch joint_memory(sizeof(Real) * static_cast<size_t>(joint_outputs() * p_.batch * state_size_));
    joint_ = reinterpret_cast<Real*>(joint_memory.data());
    sum_states();
    target_pass();
  }

 private:
  Plan make_plan() {
    Arena arena(plan_memory_.data());
    Plan plan(arena, p_.edges.size);
    plan.sources.collect(p_.edges, &Edge::source, p_.features.size);
    plan.queries.collect(p_.edges, &Edge::query, p_.features.size);
    return plan;
  }
  Buffers<Op> tile(int worker) const {
    Arena arena(tiles_.data() + worker * tile_bytes_);
    return Buffers<Op>(arena, tile_, p_.channels);
  }
  const char* weight_set(int64_t weight) const {
    return weights_.set(static_cast<const char*>(p_.packed), weight);
  }

  // Splits of a source's tokens: long enough that their states are small beside the features (1/16).
  int64_t split_tokens(int64_t slot) const {
    const int64_t tokens = p_.features[slot].tokens;
    return round_up(max64(max64(1024, 16 * p_.channels), ceil_div(tokens, 16)), kPanel<Op>);
  }
  int64_t splits(int64_t slot) const { return max64(ceil_div(p_.features[slot].tokens, split_tokens(slot)), 1); }
  // Number of the first partial state of a (source, weight) pair; its batch entries and splits follow.
  int64_t first_state(int64_t pair) const {
    int64_t count = 0;
    for (int64_t i = 0; i < pair; ++i) count += p_.batch * splits(plan_.sources.slot[i]);
    return count;
  }
  Real* partial(int64_t pair, int64_t b, int64_t split) const {
    return states_ + (first_state(pair) + b * splits(plan_.sources.slot[pair]) + split) * state_size_;
  }

  void source_pass(int64_t slot, int64_t b, int64_t split, int64_t first, int64_t last, const Buffers<Op>& t) const {
    const int64_t C = p_.channels, depth = weights_.depth();
    const int64_t begin = split * split_tokens(slot), end = min64(begin + split_tokens(slot), p_.features[slot].tokens);
    for (int64_t i = first; i < last; ++i)
      std::memset(partial(i, b, split), 0, sizeof(Real) * static_cast<size_t>(state_size_));
    const int64_t step = even_tile<Op>(end - begin, tile_);
    const Panels<Unit> x = panelled<Op>(t.x, depth), hidden = panelled<Op>(t.hidden, depth);
    const Panels<Unit> value = row_major<Op>(t.value, C);
    for (int64_t n = begin; n < end; n += step) {
      const int64_t count = min64(step, end - n);
      load_features<Op>(p_.dtype, p_.features[slot], b, n, count, C, t.x);
      for (int64_t i = first; i < last; ++i) {
        const char* set = weight_set(plan_.sources.weight[i]);
        Real* state = partial(i, b, split);
        multiply<Op, Output::kUnits>(project(set, kKey1, x, count), hidden);
        // Keys as plain rows of tokens, which the state's product broadcasts.
        multiply<Op, Output::kReal>(project(set, kKey2, hidden, count), Panels<Real>{t.real, token_row<Op>(tile_), kPanel<Op>});
        activate_keys(t, count, state + C * row_);
        Product<Op> values{count, C, depth, constant(x), weights_.matrix(set, kValue)};
        values.column_bias = weights_.bias(set, kValue);
        values.relu = true;
        multiply<Op, Output::kUnits>(values, value);
        const ptrdiff_t key_row = token_row<Op>(tile_) / Op::kDepth;
        Product<Op> sum{C, C, ceil_div(count, Op::kDepth), {t.operand, 1, kPanel<Op> * key_row}, constant(value)};
        sum.a_column = key_row;
        multiply<Op, Output::kAccumulate>(sum, row_major<Op>(state, C));
      }
    }
  }
  // A projection with tokens along the vectors; relu follows the first of two.
  Product<Op> project(const char* set, int projection, Panels<Unit> x, int64_t count) const {
    Product<Op> product{p_.channels, count, weights_.depth(), weights_.matrix(set, projection), constant(x)};
    product.row_bias = weights_.bias(set, projection);
    product.relu = projection == kKey1 || projection == kQuery1;
    return product;
  }

  // softplus of the keys in t.real, as operand; z += their sum over tokens.
  void activate_keys(const Buffers<Op>& t, int64_t count, Real* z) const {
    constexpr int64_t kW = kLanes<Real>, kStep = kW * Op::kDepth;
    const int64_t length = token_row<Op>(tile_);
    for (int64_t c = 0; c < p_.channels; ++c) {
      Real* row = t.real + c * length;
      for (int64_t n = count; n < round_up(count, kStep); ++n) row[n] = -static_cast<Real>(INFINITY);  // softplus: 0
      Vec<Real> sum{};
      for (int64_t n = 0; n < count; n += kStep) {
        const Vec<Real> k = activation<Op>(load(row + n));
        sum += k;
        if constexpr (Op::kDepth == 1) {
          store(row + n, k);
        } else {
#ifdef XATTN_HAVE_BFLOAT16_DOT
          const Vec<Real> next = activation<Op>(load(row + n + kW));
          sum += next;
          store(t.operand + c * length / 2 + n / 2, round_pair(k, next));
#endif
        }
      }
      for (int i = 0; i < kW; ++i) z[c] += sum[i];
    }
  }

  // softplus of the queries in t.real (panels), as operand.
  void activate_queries(const Buffers<Op>& t, int64_t count) const {
    const int64_t C = p_.channels, width = kPanel<Op>;
    for (int64_t n = 0; n < count; n += width) {
      Real* panel = t.real + n * C;
      const int64_t lanes = round_up(min64(count - n, width), kLanes<Real>);
      for (int64_t c = 0; c < C; c += Op::kDepth) {
        for (int64_t i = 0; i < lanes; i += kLanes<Real>) {
          Real* at = panel + c * width + i;
          const Vec<Real> q = activation<Op>(load(at));
          if constexpr (Op::kDepth == 1) {
            store(at, q);
          } else {
#ifdef XATTN_HAVE_BFLOAT16_DOT
            const Vec<Real> next = c + 1 < C ? activation<Op>(load(at + width)) : Vec<Real>{};
            store(t.operand + n * weights_.depth() + c / 2 * width + i, make_pairs(q, next));
#endif
          }
        }
      }
    }
  }

  int64_t edges_of(int64_t output) const {
    int64_t count = 0;
    for (int64_t e = 0; e < p_.edges.size; ++e) count += p_.edges[e].output == output;
    return count;
  }
  int64_t joint_outputs() const {
    int64_t count = 0;
    for (int64_t o = 0; o < p_.outputs.size; ++o) count += edges_of(o) > 1;
    return count;
  }
  // The finished state of an output: its only pair's, or the sum of its pairs'.
  Real* state_of(int64_t output, int64_t b) const {
    int64_t joint = 0, pair = 0;
    for (int64_t o = 0; o < output; ++o) joint += edges_of(o) > 1;
    for (int64_t e = 0; e < p_.edges.size; ++e)
      if (p_.edges[e].output == output) pair = plan_.sources.of_edge[e];
    return edges_of(output) > 1 ? joint_ + (joint * p_.batch + b) * state_size_ : partial(pair, b, 0);
  }

  void add_state(const Real* from, Real* to) const {
    for (int64_t i = 0; i < state_size_; i += kLanes<Real>) store(to + i, load(to + i) + load(from + i));
  }

  void sum_states() {
    parallel_for(plan_.sources.count * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t pair = index / p_.batch, b = index % p_.batch;
      for (int64_t i = 1; i < splits(plan_.sources.slot[pair]); ++i)
        add_state(partial(pair, b, i), partial(pair, b, 0));
    });
    if (joint_outputs() > 0) {
      parallel_for(p_.outputs.size * p_.batch, threads_, [&](int64_t index, int) {
        const int64_t o = index / p_.batch, b = index % p_.batch;
        if (edges_of(o) < 2) return;
        Real* sum = state_of(o, b);
        std::memset(sum, 0, sizeof(Real) * static_cast<size_t>(state_size_));
        for (int64_t e = 0; e < p_.edges.size; ++e)
          if (p_.edges[e].output == o) add_state(partial(plan_.sources.of_edge[e], b, 0), sum);
      });
    }
    if constexpr (Op::kDepth == 2) {
      const auto pack_rows = [&](Real* state) { pack_state(state); };
      parallel_for(plan_.sources.count * p_.batch, threads_, [&](int64_t index, int) {
        pack_rows(partial(index / p_.batch, index % p_.batch, 0));
      });
      parallel_for(joint_outputs() * p_.batch, threads_,
                   [&](int64_t index, int) { pack_rows(joint_ + index * state_size_); });
    }
  }

  // S^T and Z in place as operands of units: rows of pairs take the first half of S, pairs of Z its place.
  void pack_state(Real* state) const {
#ifdef XATTN_HAVE_BFLOAT16_DOT
    if constexpr (Op::kDepth == 2) {
      const int64_t C = p_.channels;
      Unit* units = reinterpret_cast<Unit*>(state);
      for (int64_t c = 0; c < C; c += 2) {
        for (int64_t i = 0; i < row_; i += kLanes<Real>) {
          const Vec<Real> odd = c + 1 < C ? load(state + (c + 1) * row_ + i) : Vec<Real>{};
          store(units + c / 2 * row_ + i, make_pairs(load(state + c * row_ + i), odd));
        }
      }
      for (int64_t k = 0; k < weights_.depth(); ++k) {
        const Real pair[2] = {state[C * row_ + 2 * k], 2 * k + 1 < C ? state[C * row_ + 2 * k + 1] : Real(0)};
        units[C * row_ + k] = make_unit<Op>(pair);
      }
    }
#else
    (void)state;
#endif
  }

  // One tile of a target's tokens and all its projections make a task; where that gives too few tasks,
  // each projection.
  void target_pass() const {
    const Pairs& queries = plan_.queries;
    int64_t tiles = 0, tasks = 0;
    for (int64_t s = 0; s < p_.features.size; ++s) tiles += queries.of(s) ? p_.batch * target_tiles(s) : 0;
    const bool whole = tiles >= kEnoughTasks;
    for (int64_t s = 0; s < p_.features.size; ++s) tasks += (whole ? queries.of(s) > 0 : queries.of(s)) * p_.batch * target_tiles(s);
    parallel_for(tasks, threads_, [&](int64_t index, int worker) {
      int64_t slot = 0, first = 0;
      for (;; ++slot) {
        const int64_t here = (whole ? queries.of(slot) > 0 : queries.of(slot)) * p_.batch * target_tiles(slot);
        if (index < here) break;
        index -= here;
        first += queries.of(slot);
      }
      const int64_t per_tile = whole ? 1 : queries.of(slot), tile_index = index / per_tile;
      if (!whole) first += index % per_tile;
      target_tile(slot, tile_index / target_tiles(slot), tile_index % target_tiles(slot), first,
                  first + (whole ? queries.of(slot) : 1), tile(worker));
    });
  }
  int64_t target_step(int64_t slot) const { return even_tile<Op>(p_.features[slot].tokens, tile_); }
  int64_t target_tiles(int64_t slot) const { return ceil_div(p_.features[slot].tokens, target_step(slot)); }

  void target_tile(int64_t slot, int64_t b, int64_t index, int64_t first, int64_t last, const Buffers<Op>& t) const {
    const int64_t C = p_.channels, depth = weights_.depth(), step = target_step(slot);
    const int64_t n = index * step, count = min64(step, p_.features[slot].tokens - n);
    const Panels<Unit> x = panelled<Op>(t.x, depth), hidden = panelled<Op>(t.hidden, depth);
    load_features<Op>(p_.dtype, p_.features[slot], b, n, count, C, t.x);
    for (int64_t pair = first; pair < last; ++pair) {
      const char* set = weight_set(plan_.queries.weight[pair]);
      multiply<Op, Output::kUnits>(project(set, kQuery1, x, count), hidden);
      multiply<Op, Output::kReal>(project(set, kQuery2, hidden, count), panelled<Op>(t.real, C));
      activate_queries(t, count);
      for (int64_t o = 0; o < p_.outputs.size; ++o)
        if (pair_of(o) == pair) write_output(o, b, n, count, t);
    }
  }
  int64_t pair_of(int64_t output) const {
    for (int64_t e = 0; e < p_.edges.size; ++e)
      if (p_.edges[e].output == output) return plan_.queries.of_edge[e];
    return -1;
  }

  void write_output(int64_t o, int64_t b, int64_t n, int64_t count, const Buffers<Op>& t) const {
    const int64_t C = p_.channels;
    const Unit* state = reinterpret_cast<const Unit*>(state_of(o, b));
    const Unit* z = state + C * row_;
    const Panels<const Unit> q = constant(panelled<Op>(t.operand, weights_.depth()));
    const Vec<Real> eps = splat(static_cast<Real>(p_.eps));
    for (int64_t m = 0; m < count; m += kLanes<Real>) {
      Vec<Real> sum{};
      const Unit* from = column<Op>(q, m);
      for (int64_t k = 0; k < weights_.depth(); ++k) sum = Op::multiply_add(sum, splat(z[k]), load(from + k * q.row));
      store(t.denominator + m, Real(1) / at_least(eps, sum));
    }
    const Panels<Real> out = panelled<Op>(t.result, C);
    multiply<Op, Output::kReal>({C, count, weights_.depth(), row_major<Op>(state, C), q}, out);
    store_channels<Op>(constant(out), t.denominator, 0, C, count, p_.dtype, p_.outputs[o], b, n);
  }

  const BlockProblem& p_;
  int threads_;
  PackedWeights<Op> weights_;
  int64_t row_, state_size_, tile_, tile_bytes_;
  Scratch plan_memory_, tiles_;
  Plan plan_;
  Real *states_ = nullptr, *joint_ = nullptr;
};

// Bytes that a call reads and writes: features, outputs and weights.
template <class Op>
int64_t operand_bytes(const BlockProblem& p) {
  int64_t tokens = 0, weights = 0;
  for (int64_t i = 0; i < p.features.size; ++i) tokens += p.features[i].tokens;
  for (int64_t o = 0; o < p.outputs.size; ++o) tokens += p.outputs[o].tokens;
  for (int64_t e = 0; e < p.edges.size; ++e) weights = max64(weights, p.edges[e].weight + 1);
  const int64_t element = p.dtype == Dtype::kFloat64 ? 8 : p.dtype == Dtype::kFloat32 ? 4 : 2;
  return p.batch * p.channels * tokens * element + weights * PackedWeights<Op>{p.channels}.bytes();
}

// Runs the outputs in waves, so that the states alive at a time stay below 1/8 of what the call reads and
// writes; they are many times the features where maps are small and wide. A wave is a number of states
// that the threads share evenly, and does not change any result.
template <class Op>
void run_in_waves(const BlockProblem& p, int threads) {
  const int64_t state = p.batch * (p.channels + 1) * row_length<Op>(p.channels) * int64_t(sizeof(typename Op::Real));
  int64_t most = max64(operand_bytes<Op>(p) / 8 / max64(state, 1), threads);
  most -= most % max64(threads, 1);
  Scratch edge_memory(sizeof(Edge) * static_cast<size_t>(p.edges.size));
  Edge* edges = reinterpret_cast<Edge*>(edge_memory.data());
  for (int64_t o = 0; o < p.outputs.size;) {
    int64_t count = 0;
    for (; o < p.outputs.size; ++o) {
      int64_t more = 0;
      for (int64_t e = 0; e < p.edges.size; ++e)
        if (p.edges[e].output == o) edges[count + more++] = p.edges[e];
      if (count > 0 && count + more > most) break;
      count += more;
    }
    BlockProblem wave = p;
    wave.edges = {edges, count};
    Block<Op>(wave, threads).run();
  }
}

template <class Body>
void with_op(Dtype dtype, Body&& body) {
  if (dtype == Dtype::kFloat64) return body(Float64{});
#ifdef XATTN_HAVE_BFLOAT16_DOT
  if (dtype == Dtype::kBFloat16) return body(BFloat16Pair{});
#endif
  body(Float32{});
}

}  // namespace

size_t block_packed_bytes(Dtype dtype, int64_t channels, int64_t weights) {
  size_t bytes = 0;
  with_op(dtype, [&](auto op) {
    bytes = static_cast<size_t>(kLayoutHeader + weights * PackedWeights<decltype(op)>{channels}.bytes());
  });
  return bytes;
}

void block_pack(Dtype dtype, int64_t channels, int64_t weights, const void* weight, const void* bias, void* packed) {
  with_op(dtype, [&](auto op) { pack<decltype(op)>(channels, weights, weight, bias, packed); });
}

bool block_forward(const BlockProblem& problem, int threads) {
  bool right_layout = true;
  with_op(problem.dtype, [&](auto op) {
    int64_t layout;
    std::memcpy(&layout, problem.packed, sizeof(layout));
    right_layout = layout == PackedWeights<decltype(op)>::layout();
    if (right_layout) run_in_waves<decltype(op)>(problem, threads);
  });
  return right_layout;
}

}  // namespace XATTN_ISA
}  // namespace xattn
