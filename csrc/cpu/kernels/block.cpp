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
#include "../../edges.h"
#include "../math.h"
#include "../pack.h"
#include "../pieces.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

enum Projection : int { kQuery1, kQuery2, kKey1, kKey2, kValue, kProjections };

constexpr int64_t kTileBytes = 128 * 1024;  // of one matrix of a tile
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

// One projection into its packed matrix and bias: W and b, or with the statistics of a batch norm
// diag(s) W and beta - s mean for s = gamma / sqrt(var + eps). The scale is computed in double: it is
// the same for all products of a channel, whose rounding errors would not average out.
template <class Op>
void pack_projection(const FoldedLayer& layer, int64_t channels, double eps, typename Op::Unit* matrix,
                     typename Op::Real* bias) {
  using Real = typename Op::Real;
  const PackedWeights<Op> layout{channels};
  const int64_t depth = layout.depth();
  const Real *weight = static_cast<const Real*>(layer.weight), *gamma = static_cast<const Real*>(layer.gamma),
             *beta = static_cast<const Real*>(layer.beta), *mean = static_cast<const Real*>(layer.mean),
             *var = static_cast<const Real*>(layer.var);
  for (int64_t first = 0; first < layout.padded(); first += kPanel<Op>) {
    const int64_t width = min64(channels - first, kPanel<Op>);
    double scale[kPanel<Op>];
    for (int64_t i = 0; i < kPanel<Op>; ++i) {
      const int64_t m = first + i;
      scale[i] = i < width && gamma != nullptr ? double(gamma[m]) / __builtin_sqrt(double(var[m]) + eps) : 1.0;
      const double shift = i < width && gamma != nullptr ? scale[i] * double(mean[m]) : 0.0;
      bias[m] = i < width ? Real(double(beta[m]) - shift) : Real(0);
    }
    auto* panel = matrix + first * depth;
    for (int64_t k = 0; k < depth; ++k, panel += kPanel<Op>) {
      for (int64_t i = 0; i < width; ++i) {
        const Real* row = weight + (first + i) * channels + k * Op::kDepth;
        Real values[2] = {Real(row[0] * scale[i]), Real(0)};
        if (Op::kDepth == 2 && k * 2 + 1 < channels) values[1] = Real(row[1] * scale[i]);
        panel[i] = make_unit<Op>(values);
      }
      for (int64_t i = max64(width, 0); i < kPanel<Op>; ++i) panel[i] = typename Op::Unit(0);
    }
  }
}

template <class Op>
void pack(int64_t channels, Span<const FoldedLayer> layers, double eps, char* packed, int threads) {
  const PackedWeights<Op> layout{channels};
  std::memset(packed, 0, kLayoutHeader);
  const int64_t number = layout.layout();
  std::memcpy(packed, &number, sizeof(number));
  parallel_for(layers.size / kProjections, threads, [&](int64_t w, int) {
    char* set = layout.set(packed, w);
    for (int i = 0; i < kProjections; ++i)
      pack_projection<Op>(layers[w * kProjections + i], channels, eps,
                          const_cast<typename Op::Unit*>(layout.matrix(set, i).data),
                          const_cast<typename Op::Real*>(layout.bias(set, i)));
    char* end = reinterpret_cast<char*>(const_cast<typename Op::Real*>(layout.bias(set, kProjections)));
    std::memset(end, 0, static_cast<size_t>(set + layout.bytes() - end));
  });
}

// Length of a channel's row of keys, in reals: whole vectors of units.
template <class Op>
int64_t token_row(int64_t tokens) {
  return round_up(tokens, kLanes<typename Op::Real> * Op::kDepth);
}

template <class Op>
struct Buffers {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  Unit *x, *hidden, *activated, *value;  // features, first layer, keys or queries, values
  Real *result, *denominator;
  Buffers(Arena& arena, int64_t tokens, int64_t channels) {
    const int64_t rows = round_up(tokens, kPanel<Op>), depth = ceil_div(channels, Op::kDepth);
    x = arena.take<Unit>(rows * depth);
    hidden = arena.take<Unit>(rows * depth);
    activated = arena.take<Unit>(max64(token_row<Op>(rows) / Op::kDepth * channels, rows * depth));
    value = arena.take<Unit>(rows / Op::kDepth * max64(row_length<Op>(channels), channels));
    // The target pass has no values; where they are as large as its result, that takes their room.
    result = Op::kDepth == 1 ? reinterpret_cast<Real*>(value) : arena.take<Real>(rows * channels);
    denominator = arena.take<Real>(rows);
  }
};

// The distinct (slot, weight) pairs of one side of the edges, sorted by slot: those of slot s are from
// begin[s] to begin[s + 1].
struct Pairs {
  int64_t *slot, *weight, *of_edge, *begin;
  int64_t count = 0;
  Pairs(Arena& arena, int64_t edges, int64_t slots)
      : slot(arena.take<int64_t>(edges)),
        weight(arena.take<int64_t>(edges)),
        of_edge(arena.take<int64_t>(edges)),
        begin(arena.take<int64_t>(slots + 1)) {}
  int64_t of(int64_t s) const { return begin[s + 1] - begin[s]; }
  void collect(const EdgeList& edges, Span<const int64_t> order, Span<const int64_t> order_begin) {
    for (int64_t s = 0; s + 1 < order_begin.size; ++s) {
      begin[s] = count;
      for (int64_t i = order_begin[s]; i < order_begin[s + 1]; ++i) {
        int64_t pair = begin[s];
        while (pair < count && weight[pair] != edges.all[order[i]].weight) ++pair;
        of_edge[order[i]] = pair;
        if (pair < count) continue;
        slot[count] = s;
        weight[count++] = edges.all[order[i]].weight;
      }
      begin[s + 1] = count;
    }
  }
};

struct Plan {
  Pairs sources, queries;
  int64_t *first_state, *joint;  // of a source pair: its first partial state; of an output: its joint state
  Plan(Arena& arena, int64_t edges, int64_t slots, int64_t outputs)
      : sources(arena, edges, slots),
        queries(arena, edges, slots),
        first_state(arena.take<int64_t>(edges + 1)),
        joint(arena.take<int64_t>(outputs + 1)) {}
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
        tile_(tile_tokens<Op>(problem.channels, Op::kDepth * kTileBytes)),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Buffers<Op>>(tile_, problem.channels)), 64)),
        plan_memory_(bytes_of<Plan>(problem.edges.all.size, problem.features.size, problem.outputs.size)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))),
        plan_(make_plan()) {}

  void run() {
    const int64_t joint = plan_.joint[p_.outputs.size];
    Scratch state_memory(sizeof(Real) * static_cast<size_t>(plan_.first_state[plan_.sources.count] * state_size_));
    Scratch joint_memory(sizeof(Real) * static_cast<size_t>(joint * p_.batch * state_size_));
    states_ = reinterpret_cast<Real*>(state_memory.data());
    joint_ = reinterpret_cast<Real*>(joint_memory.data());
    for_tiles(
        plan_.sources, [&](int64_t tokens) { return split_tokens(tokens); },
        [&](const Piece& piece, int64_t first, int64_t last, int worker) {
          source_pass(piece, first, last, tile(worker));
        });
    sum_states();
    for_tiles(
        plan_.queries, [&](int64_t tokens) { return even_tile<Op>(tokens, tile_); },
        [&](const Piece& piece, int64_t first, int64_t last, int worker) {
          target_pass(piece, first, last, tile(worker));
        });
  }

 private:
  Plan make_plan() {
    Arena arena(plan_memory_.data());
    Plan plan(arena, p_.edges.all.size, p_.features.size, p_.outputs.size);
    plan.sources.collect(p_.edges, p_.edges.by_source, p_.edges.source_begin);
    plan.queries.collect(p_.edges, p_.edges.by_query, p_.edges.query_begin);
    plan.first_state[0] = plan.joint[0] = 0;
    for (int64_t i = 0; i < plan.sources.count; ++i)
      plan.first_state[i + 1] = plan.first_state[i] + p_.batch * splits(plan.sources.slot[i]);
    for (int64_t o = 0; o < p_.outputs.size; ++o) plan.joint[o + 1] = plan.joint[o] + (p_.edges.count(o) > 1);
    return plan;
  }

  // Calls body for every piece of the slots that have pairs. A piece is read once for all its pairs; where
  // that gives too few tasks, each pair is one.
  template <class Step, class Body>
  void for_tiles(const Pairs& pairs, const Step& step, const Body& body) const {
    const Pieces pieces(p_.features, p_.batch, step, [&](int64_t slot) { return pairs.of(slot) > 0; });
    int64_t most = 1;
    if (pieces.total() < kEnoughTasks)
      for (int64_t slot = 0; slot < p_.features.size; ++slot) most = max64(most, pairs.of(slot));
    parallel_for(pieces.total() * most, threads_, [&](int64_t index, int worker) {
      const Piece piece = pieces[index / most];
      const int64_t first = pairs.begin[piece.slot], last = pairs.begin[piece.slot + 1], pair = first + index % most;
      if (most == 1) {
        body(piece, first, last, worker);
      } else if (pair < last) {
        body(piece, pair, pair + 1, worker);
      }
    });
  }

  Buffers<Op> tile(int worker) const {
    Arena arena(tiles_.data() + worker * tile_bytes_);
    return Buffers<Op>(arena, tile_, p_.channels);
  }
  const char* weight_set(int64_t weight) const { return weights_.set(static_cast<const char*>(p_.packed), weight); }

  // A source's tokens are split so that the partial states are small beside the features: 1/16 of them.
  int64_t split_tokens(int64_t tokens) const {
    return round_up(max64(max64(1024, 16 * p_.channels), ceil_div(tokens, 16)), kPanel<Op>);
  }
  // At least one, so that an empty source has its state, zero.
  int64_t splits(int64_t slot) const {
    return max64(ceil_div(p_.features[slot].tokens, split_tokens(p_.features[slot].tokens)), 1);
  }
  Real* partial(int64_t pair, int64_t b, int64_t split) const {
    return states_ + (plan_.first_state[pair] + b * splits(plan_.sources.slot[pair]) + split) * state_size_;
  }

  void source_pass(const Piece& piece, int64_t first, int64_t last, const Buffers<Op>& t) const {
    const int64_t C = p_.channels, depth = weights_.depth(), end = piece.begin + piece.count;
    for (int64_t i = first; i < last; ++i) clear_state(partial(i, piece.row, piece.part));
    const int64_t step = even_tile<Op>(piece.count, tile_);
    const Panels<Unit> x = panelled<Op>(t.x, depth), hidden = panelled<Op>(t.hidden, depth);
    const Panels<Unit> value = row_major<Op>(t.value, C);
    for (int64_t n = piece.begin; n < end; n += step) {
      const int64_t count = min64(step, end - n);
      load_features<Op>(p_.dtype, p_.features[piece.slot], piece.row, n, count, C, t.x);
      for (int64_t i = first; i < last; ++i) {
        const char* set = weight_set(plan_.sources.weight[i]);
        Real* state = partial(i, piece.row, piece.part);
        multiply<Op, Output::kUnits>(project(set, kKey1, x, count), hidden);
        // Keys as plain rows of tokens, which the state's product broadcasts.
        const ptrdiff_t key_row = token_row<Op>(tile_) / Op::kDepth;
        multiply<Op, Output::kColumnUnits>(project(set, kKey2, hidden, count),
                                           Panels<Unit>{t.activated, key_row, kPanel<Op> / Op::kDepth});
        sum_keys(t, count, state + C * row_);
        Product<Op> values{count, C, depth, constant(x), weights_.matrix(set, kValue)};
        values.column_bias = weights_.bias(set, kValue);
        values.activation = Activation::kRelu;
        multiply<Op, Output::kUnits>(values, value);
        Product<Op> sum{C, C, ceil_div(count, Op::kDepth), {t.activated, 1, kPanel<Op> * key_row}, constant(value)};
        sum.a_column = key_row;
        multiply<Op, Output::kAccumulate>(sum, row_major<Op>(state, C));
      }
    }
  }

  // A projection with tokens along the vectors: the first of two ends in relu, the second in softplus.
  Product<Op> project(const char* set, int projection, Panels<Unit> x, int64_t count) const {
    Product<Op> product{p_.channels, count, weights_.depth(), weights_.matrix(set, projection), constant(x)};
    product.row_bias = weights_.bias(set, projection);
    const bool first = projection == kKey1 || projection == kQuery1;
    product.activation = first ? Activation::kRelu : Activation::kSoftplus;
    return product;
  }

  // z += sum of the keys over tokens; what lies behind the last token becomes zero.
  void sum_keys(const Buffers<Op>& t, int64_t count, Real* z) const {
    constexpr int64_t kW = kLanes<Real>;
    const int64_t length = token_row<Op>(tile_) / Op::kDepth;
    const Real ones[2] = {1, 1};
    const Vec<Unit> one = splat(make_unit<Op>(ones));
    for (int64_t c = 0; c < p_.channels; ++c) {
      Unit* row = t.activated + c * length;
      const size_t element = sizeof(Unit) / Op::kDepth, end = static_cast<size_t>(round_up(count, kW * Op::kDepth));
      std::memset(reinterpret_cast<char*>(row) + static_cast<size_t>(count) * element, 0,
                  (end - static_cast<size_t>(count)) * element);
      Vec<Real> sum{};
      for (int64_t n = 0; n < ceil_div(count, Op::kDepth); n += kW) sum = Op::multiply_add(sum, one, load(row + n));
      for (int i = 0; i < kW; ++i) z[c] += sum[i];
    }
  }

  // The finished state of an output: its only pair's, or the sum of its pairs'.
  Real* state_of(int64_t o, int64_t b) const {
    return p_.edges.count(o) > 1 ? joint_ + (plan_.joint[o] * p_.batch + b) * state_size_
                                 : partial(plan_.sources.of_edge[p_.edges.output_begin[o]], b, 0);
  }

  void clear_state(Real* state) const { std::memset(state, 0, sizeof(Real) * static_cast<size_t>(state_size_)); }
  void add_state(const Real* from, Real* to) const {
    for (int64_t i = 0; i < state_size_; i += kLanes<Real>) store(to + i, load(to + i) + load(from + i));
  }

  void sum_states() {
    const int64_t joint = plan_.joint[p_.outputs.size];
    parallel_for(plan_.sources.count * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t pair = index / p_.batch, b = index % p_.batch, parts = splits(plan_.sources.slot[pair]);
      for (int64_t i = 1; i < parts; ++i) add_state(partial(pair, b, i), partial(pair, b, 0));
      if (p_.features[plan_.sources.slot[pair]].tokens == 0) clear_state(partial(pair, b, 0));
      if (joint == 0) pack_state(partial(pair, b, 0));
    });
    if (joint == 0) return;
    parallel_for(p_.outputs.size * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t o = index / p_.batch, b = index % p_.batch;
      if (p_.edges.count(o) < 2) return;
      Real* sum = state_of(o, b);
      clear_state(sum);
      for (int64_t e = p_.edges.output_begin[o]; e < p_.edges.output_begin[o + 1]; ++e)
        add_state(partial(plan_.sources.of_edge[e], b, 0), sum);
      pack_state(sum);
    });
    // Only now: states of outputs of their own may also have been terms of sums.
    parallel_for(plan_.sources.count * p_.batch, threads_,
                 [&](int64_t index, int) { pack_state(partial(index / p_.batch, index % p_.batch, 0)); });
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

  void target_pass(const Piece& piece, int64_t first, int64_t last, const Buffers<Op>& t) const {
    const Panels<Unit> x = panelled<Op>(t.x, weights_.depth()), hidden = panelled<Op>(t.hidden, weights_.depth());
    load_features<Op>(p_.dtype, p_.features[piece.slot], piece.row, piece.begin, piece.count, p_.channels, t.x);
    for (int64_t pair = first; pair < last; ++pair) {
      const char* set = weight_set(plan_.queries.weight[pair]);
      multiply<Op, Output::kUnits>(project(set, kQuery1, x, piece.count), hidden);
      multiply<Op, Output::kUnits>(project(set, kQuery2, hidden, piece.count),
                                   panelled<Op>(t.activated, weights_.depth()));
      for (int64_t i = p_.edges.query_begin[piece.slot]; i < p_.edges.query_begin[piece.slot + 1]; ++i) {
        const int64_t e = p_.edges.by_query[i], o = p_.edges.all[e].output;
        if (plan_.queries.of_edge[e] == pair && e == p_.edges.output_begin[o])
          write_output(o, piece.row, piece.begin, piece.count, t);
      }
    }
  }

  void write_output(int64_t o, int64_t b, int64_t n, int64_t count, const Buffers<Op>& t) const {
    const int64_t C = p_.channels;
    const Unit* state = reinterpret_cast<const Unit*>(state_of(o, b));
    const Unit* z = state + C * row_;
    const Panels<const Unit> q = constant(panelled<Op>(t.activated, weights_.depth()));
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
  for (int64_t e = 0; e < p.edges.all.size; ++e) weights = max64(weights, p.edges.all[e].weight + 1);
  const int64_t element = p.dtype == Dtype::kFloat64 ? 8 : p.dtype == Dtype::kFloat32 ? 4 : 2;
  return p.batch * p.channels * tokens * element + weights * PackedWeights<Op>{p.channels}.bytes();
}

// Runs the outputs in waves, so that the states alive at a time stay below 1/8 of what the call reads and
// writes; they are many times the features where maps are small and wide. A wave has at least three states
// a thread, a number that the threads share evenly, and does not change any result.
template <class Op>
void run_in_waves(const BlockProblem& p, int threads) {
  const int64_t state = p.batch * (p.channels + 1) * row_length<Op>(p.channels) * int64_t(sizeof(typename Op::Real));
  int64_t most = max64(operand_bytes<Op>(p) / 8 / max64(state, 1), 3 * threads);
  most -= most % max64(threads, 1);
  for (int64_t first = 0, last = 0; first < p.outputs.size; first = last) {
    for (++last; last < p.outputs.size; ++last)
      if (p.edges.output_begin[last + 1] - p.edges.output_begin[first] > most) break;
    const EdgeIndex edges(p.edges, first, last);
    BlockProblem wave = p;
    wave.edges = edges.list();
    Block<Op>(wave, threads).run();
  }
}

}  // namespace

size_t block_packed_bytes(Dtype dtype, int64_t channels, int64_t weights) {
  size_t bytes = 0;
  with_op(dtype, [&](auto op) {
    bytes = static_cast<size_t>(kLayoutHeader + weights * PackedWeights<decltype(op)>{channels}.bytes());
  });
  return bytes;
}

void block_pack(Dtype dtype, int64_t channels, Span<const FoldedLayer> layers, double eps, void* packed, int threads) {
  with_op(dtype, [&](auto op) { pack<decltype(op)>(channels, layers, eps, static_cast<char*>(packed), threads); });
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
