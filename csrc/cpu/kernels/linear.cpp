// Linear cross-attention, forward and backward.
//
//   S_o = sum_edges(o) sum_n v_n phi(k_n)^T    Z_o = sum_edges(o) sum_n phi(k_n)
//   out_o[:, m] = S_o phi(q_m) / max(Z_o . phi(q_m), eps)
//
// Plan: (1) one partial state per (batch, source, split of its tokens), the splits being a function of
// the token count alone; (2) their sum per output, in a fixed order; (3) tiles of targets. The backward
// mirrors it: tiles of targets give partial dS, dZ; sums; tiles of sources. No atomics: results do not
// depend on the number of threads. States are kept transposed in scratch, (C, Cv), as the products want.
#include "../math.h"
#include "../pack.h"
#include "../pieces.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

constexpr int64_t kTileBytes = 96 * 1024;  // of one matrix; a tile's four fit a second-level cache

// Tokens of one split: at least 1024, at most 16 splits.
template <class Op>
int64_t split_tokens(int64_t tokens) {
  return max64(1024, round_up(ceil_div(tokens, 16), kPanel<Op>));
}

// A state in scratch: transposed S, rows padded, then Z.
template <class Op>
struct StateLayout {
  using Real = typename Op::Real;
  int64_t channels, value_channels;
  int64_t row() const { return row_length<Op>(value_channels); }
  int64_t size() const { return round_up(channels * row() + channels + kLanes<Real>, 16); }
  Panels<Real> s(Real* state) const { return row_major<Op>(state, value_channels); }
  Panels<const Real> s(const Real* state) const { return row_major<Op>(state, value_channels); }
  template <class T>
  T* z(T* state) const {
    return state + channels * row();
  }
  void clear(Real* state) const { std::memset(state, 0, sizeof(Real) * static_cast<size_t>(size())); }
  void add(const Real* from, Real* to) const {
    for (int64_t i = 0; i < size(); i += kLanes<Real>) store(to + i, load(to + i) + load(from + i));
  }
  // From and to the caller's layout: S (value_channels, channels), Z (channels).
  void import_s(const Real* s, Real* state) const {
    for (int64_t v = 0; v < value_channels; ++v)
      for (int64_t c = 0; c < channels; ++c) state[c * row() + v] += s[v * channels + c];
  }
  void import_z(const Real* from, Real* state) const {
    for (int64_t c = 0; c < channels; ++c) z(state)[c] += from[c];
  }
  void export_s(const Real* state, Real* to) const {
    for (int64_t v = 0; v < value_channels; ++v)
      for (int64_t c = 0; c < channels; ++c) to[v * channels + c] = state[c * row() + v];
  }
  void export_z(const Real* state, Real* to) const { std::memcpy(to, z(state), sizeof(Real) * size_t(channels)); }
};

template <class Op>
struct Tile {
  using Real = typename Op::Real;
  // Panels (channels x tokens) and row-major (tokens x channels) matrices of a tile.
  Real *q, *before_map, *g, *w, *total, *rows_k, *rows_v, *denominator, *weight,
      *ones;  // weight: also the sum of a tile of keys
  Tile(Arena& arena, int64_t tokens, int64_t channels, int64_t value_channels) {
    const int64_t padded = round_up(tokens, kPanel<Op>);
    q = arena.take<Real>(padded * channels);
    before_map = arena.take<Real>(padded * channels);
    g = arena.take<Real>(padded * value_channels);
    w = arena.take<Real>(padded * max64(value_channels, channels));
    total = arena.take<Real>(padded * channels);
    rows_k = arena.take<Real>(tokens * row_length<Op>(channels));
    rows_v = arena.take<Real>(tokens * row_length<Op>(value_channels));
    denominator = arena.take<Real>(padded);
    weight = arena.take<Real>(max64(padded, channels));
    ones = arena.take<Real>(padded);
  }
};

template <class Op>
class Linear {
 public:
  using Real = typename Op::Real;
  Linear(const LinearProblem& problem, int threads)
      : p_(problem),
        threads_(threads),
        layout_{problem.channels, problem.value_channels},
        tile_(tile_tokens<Op>(max64(problem.channels, problem.value_channels), kTileBytes)),
        tile_bytes_(
            round_up(static_cast<int64_t>(bytes_of<Tile<Op>>(tile_, problem.channels, problem.value_channels)), 64)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))) {}

  void forward() {
    const Pieces sources(p_.keys, p_.batch, split_tokens<Op>), targets(p_.outputs, p_.batch, split_tokens<Op>);
    const int64_t size = layout_.size(), states_count = p_.outputs.size * p_.batch;
    Scratch partial_memory(sizeof(Real) * static_cast<size_t>(sources.total() * size));
    Scratch state_memory(sizeof(Real) * static_cast<size_t>(states_count * size));
    Real* partial = reinterpret_cast<Real*>(partial_memory.data());
    Real* states = reinterpret_cast<Real*>(state_memory.data());
    parallel_for(sources.total(), threads_, [&](int64_t index, int worker) {
      source_state(sources[index], partial + index * size, tile(worker));
    });
    parallel_for(states_count, threads_, [&](int64_t index, int) {
      const int64_t o = index / p_.batch, b = index % p_.batch;
      Real* state = states + index * size;
      layout_.clear(state);
      if (p_.initial_s) layout_.import_s(user_s<const Real>(p_.initial_s, index), state);
      if (p_.initial_z) layout_.import_z(user_z<const Real>(p_.initial_z, index), state);
      for (int64_t e = p_.edges.output_begin[o]; e < p_.edges.output_begin[o + 1]; ++e) {
        const int64_t j = p_.edges.all[e].source;
        for (int64_t i = 0; i < sources.parts(j); ++i) layout_.add(partial + sources.number(j, b, i) * size, state);
      }
      layout_.export_s(state, user_s<Real>(p_.state_s, index));
      layout_.export_z(state, user_z<Real>(p_.state_z, index));
    });
    parallel_for(targets.total(), threads_, [&](int64_t index, int worker) {
      const Piece piece = targets[index];
      apply_state(piece, states + (piece.slot * p_.batch + piece.row) * size, tile(worker));
    });
  }

  void backward(const LinearGradients& g) {
    // An output has the tokens of its query: its partial states are numbered like the query's pieces.
    const Pieces outputs(p_.outputs, p_.batch, split_tokens<Op>), targets(p_.queries, p_.batch, split_tokens<Op>),
        sources(p_.keys, p_.batch, split_tokens<Op>);
    const int64_t size = layout_.size(), states_count = p_.outputs.size * p_.batch;
    Scratch partial_memory(sizeof(Real) * static_cast<size_t>(outputs.total() * size));
    Scratch gradient_memory(sizeof(Real) * static_cast<size_t>(states_count * size));
    Real* partial = reinterpret_cast<Real*>(partial_memory.data());
    Real* gradients = reinterpret_cast<Real*>(gradient_memory.data());
    // A query slot owns its gradient, so one task serves all outputs of a piece of its tokens.
    parallel_for(targets.total(), threads_, [&](int64_t index, int worker) {
      target_gradients(g, targets[index], outputs, partial, tile(worker));
    });
    parallel_for(states_count, threads_, [&](int64_t index, int) {
      const int64_t o = index / p_.batch, b = index % p_.batch;
      Real* gradient = gradients + index * size;
      layout_.clear(gradient);
      if (g.grad_state_s) layout_.import_s(user_s<const Real>(g.grad_state_s, index), gradient);
      if (g.grad_state_z) layout_.import_z(user_z<const Real>(g.grad_state_z, index), gradient);
      if (g.grad_outputs[o].data)
        for (int64_t i = 0; i < outputs.parts(o); ++i) layout_.add(partial + outputs.number(o, b, i) * size, gradient);
      if (g.initial_s) layout_.export_s(gradient, user_s<Real>(g.initial_s, index));
      if (g.initial_z) layout_.export_z(gradient, user_z<Real>(g.initial_z, index));
    });
    // What a source sees is the sum over the outputs it feeds; both layouts of it serve as operands.
    const int64_t both = size + round_up(p_.value_channels * p_.channels, 16);
    Scratch source_memory(sizeof(Real) * static_cast<size_t>(p_.keys.size * p_.batch * both));
    Real* source_states = reinterpret_cast<Real*>(source_memory.data());
    parallel_for(p_.keys.size * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t j = index / p_.batch, b = index % p_.batch;
      Real* sum = source_states + index * both;
      layout_.clear(sum);
      for (int64_t i = p_.edges.source_begin[j]; i < p_.edges.source_begin[j + 1]; ++i)
        layout_.add(gradients + (p_.edges.all[p_.edges.by_source[i]].output * p_.batch + b) * size, sum);
      for (int64_t v = 0; v < p_.value_channels; ++v)
        for (int64_t c = 0; c < p_.channels; ++c) sum[size + v * p_.channels + c] = sum[c * layout_.row() + v];
    });
    parallel_for(sources.total(), threads_, [&](int64_t index, int worker) {
      const Piece piece = sources[index];
      source_gradients(g, piece, source_states + (piece.slot * p_.batch + piece.row) * both, tile(worker));
    });
  }

 private:
  Tile<Op> tile(int worker) const {
    Arena arena(tiles_.data() + worker * tile_bytes_);
    const Tile<Op> tile(arena, tile_, p_.channels, p_.value_channels);
    for (int64_t n = 0; n < tile_; ++n) tile.ones[n] = Real(1);
    return tile;
  }
  // The caller's states are (outputs, batch, ...): `index` counts output * batch + b.
  template <class T, class Base>
  T* user_s(Base* base, int64_t index) const {
    return static_cast<T*>(base) + index * p_.value_channels * p_.channels;
  }
  template <class T, class Base>
  T* user_z(Base* base, int64_t index) const {
    return static_cast<T*>(base) + index * p_.channels;
  }

  // One piece of a source: S^T += phi(k) v^T and Z += phi(k).
  void source_state(Piece piece, Real* state, const Tile<Op>& t) const {
    layout_.clear(state);
    const int64_t row = row_length<Op>(p_.channels);
    const Panels<Real> k = row_major<Op>(t.rows_k, p_.channels), v = row_major<Op>(t.rows_v, p_.value_channels);
    for (int64_t n = piece.begin, end = n + piece.count; n < end; n += tile_) {
      const int64_t count = min64(tile_, end - n);
      load_tokens<Op>(p_.dtype, p_.keys[piece.slot], piece.row, n, count, 0, p_.channels, k);
      load_tokens<Op>(p_.dtype, p_.values[piece.slot], piece.row, n, count, 0, p_.value_channels, v);
      apply_feature_map(p_.feature_map, t.rows_k, count * row);
      for (int64_t c = 0; c < p_.channels; ++c) t.weight[c] = 0;
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < p_.channels; ++c) t.weight[c] += t.rows_k[i * row + c];
      for (int64_t c = 0; c < p_.channels; ++c) layout_.z(state)[c] += t.weight[c];
      multiply<Op, Output::kAccumulate>({p_.channels, p_.value_channels, count, constant(k), constant(v)},
                                        layout_.s(state));
    }
  }

  // Z . phi(q) of a tile, before the clamp.
  void denominators(const Real* z, int64_t count, const Tile<Op>& t) const {
    for (int64_t n = 0; n < count; n += kLanes<Real>) {
      const Real* q = t.q + n / kPanel<Op> * kPanel<Op> * p_.channels + n % kPanel<Op>;
      Vec<Real> sum{};
      for (int64_t c = 0; c < p_.channels; ++c) sum += splat(z[c]) * load(q + c * kPanel<Op>);
      store(t.denominator + n, sum);
    }
  }
  int64_t whole(int64_t count) const { return round_up(count, kPanel<Op>); }

  void apply_state(Piece piece, const Real* state, const Tile<Op>& t) const {
    const View& query = p_.queries[p_.edges.query_of(piece.slot)];
    const Vec<Real> eps = splat(static_cast<Real>(p_.eps));
    const Panels<Real> q = panelled<Op>(t.q, p_.channels), out = panelled<Op>(t.w, p_.value_channels);
    for (int64_t n = piece.begin, end = n + piece.count; n < end; n += tile_) {
      const int64_t count = min64(tile_, end - n);
      load_channels<Op>(p_.dtype, query, piece.row, n, count, 0, p_.channels, q);
      apply_feature_map(p_.feature_map, t.q, whole(count) * p_.channels);
      denominators(layout_.z(state), count, t);
      multiply<Op, Output::kReal>({p_.value_channels, count, p_.channels, layout_.s(state), constant(q)}, out);
      for (int64_t m = 0; m < count; m += kLanes<Real>)
        store(t.denominator + m, Real(1) / at_least(eps, load(t.denominator + m)));
      store_channels<Op>(constant(out), t.denominator, 0, p_.value_channels, count, p_.dtype, p_.outputs[piece.slot],
                         piece.row, n);
    }
  }

  // dq of one piece of a query slot, and the partial dS, dZ of each of its outputs. With g the output's
  // gradient, d the denominator, w = S^T g and c = (w . phi(q)) / d (0 where the clamp is active):
  //   dS = sum g phi(q)^T / d    dZ = -sum c phi(q) / d    dphi(q) = (w - c Z) / d
  void target_gradients(const LinearGradients& g, Piece piece, const Pieces& outputs, Real* partial,
                        const Tile<Op>& t) const {
    const View &query = p_.queries[piece.slot], &dq = g.queries[piece.slot];
    const auto sum_of = [&](int64_t o) { return partial + outputs.number(o, piece.row, piece.part) * layout_.size(); };
    for_outputs(g, piece.slot, [&](int64_t o) { layout_.clear(sum_of(o)); });
    for (int64_t n = piece.begin, end = n + piece.count; n < end; n += tile_) {
      const int64_t count = min64(tile_, end - n), width = whole(count) * p_.channels;
      load_channels<Op>(p_.dtype, query, piece.row, n, count, 0, p_.channels, panelled<Op>(t.before_map, p_.channels));
      std::memcpy(t.q, t.before_map, sizeof(Real) * static_cast<size_t>(width));
      apply_feature_map(p_.feature_map, t.q, width);
      load_tokens<Op>(p_.dtype, query, piece.row, n, count, 0, p_.channels, row_major<Op>(t.rows_k, p_.channels));
      apply_feature_map(p_.feature_map, t.rows_k, count * row_length<Op>(p_.channels));
      std::memset(t.total, 0, sizeof(Real) * static_cast<size_t>(width));
      for_outputs(g, piece.slot,
                  [&](int64_t o) { output_gradients(g.grad_outputs[o], o, piece.row, n, count, sum_of(o), t); });
      if (!dq.data) continue;
      multiply_by_derivative(p_.feature_map, t.before_map, t.total, width);
      store_channels<Op>(constant(panelled<Op>(t.total, p_.channels)), t.ones, 0, p_.channels, count, p_.dtype, dq,
                         piece.row, n);
    }
  }
  // The outputs of a query slot that have a gradient. Edges of an output lie together.
  template <class Body>
  void for_outputs(const LinearGradients& g, int64_t query, const Body& body) const {
    for (int64_t i = p_.edges.query_begin[query]; i < p_.edges.query_begin[query + 1]; ++i) {
      const int64_t e = p_.edges.by_query[i], o = p_.edges.all[e].output;
      if (e == p_.edges.output_begin[o] && g.grad_outputs[o].data) body(o);
    }
  }

  // One output's share of target_gradients on a tile: adds to t.total (dphi(q)) and to `sum` (dS, dZ).
  void output_gradients(const View& grad, int64_t o, int64_t b, int64_t n, int64_t count, Real* sum,
                        const Tile<Op>& t) const {
    const int64_t C = p_.channels, V = p_.value_channels;
    const Real* z = user_z<const Real>(p_.state_z, o * p_.batch + b);
    const Panels<Real> g = panelled<Op>(t.g, V), w = panelled<Op>(t.w, C), q = panelled<Op>(t.q, C);
    load_channels<Op>(p_.dtype, grad, b, n, count, 0, V, g);
    const Panels<const Real> s{user_s<const Real>(p_.state_s, o * p_.batch + b), C, kPanel<Op>};
    multiply<Op, Output::kReal>({C, count, V, s, constant(g)}, w);
    denominators(z, count, t);
    const Vec<Real> eps = splat(static_cast<Real>(p_.eps)), zero{};
    for (int64_t m = 0; m < count; m += kLanes<Real>) {
      const Vec<Real> d = load(t.denominator + m), inverse = Real(1) / at_least(eps, d);
      const Real *wm = column<Op>(w, m), *qm = column<Op>(q, m);
      Real* total = column<Op>(panelled<Op>(t.total, C), m);
      Vec<Real> dot{};
      for (int64_t c = 0; c < C; ++c) dot += load(wm + c * w.row) * load(qm + c * q.row);
      dot = d < eps ? zero : dot * inverse;
      for (int64_t c = 0; c < C; ++c)
        store(total + c * w.row, load(total + c * w.row) + (load(wm + c * w.row) - dot * z[c]) * inverse);
      store(t.denominator + m, inverse);
      store(t.weight + m, dot * inverse);
    }
    const Panels<Real> rows_q = row_major<Op>(t.rows_k, C), rows_g = row_major<Op>(t.rows_v, V);
    load_tokens<Op>(p_.dtype, grad, b, n, count, 0, V, rows_g);
    Real* sum_z = layout_.z(sum);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t v = 0; v < V; ++v) rows_g.data[i * rows_g.row + v] *= t.denominator[i];
      for (int64_t c = 0; c < C; ++c) sum_z[c] -= rows_q.data[i * rows_q.row + c] * t.weight[i];
    }
    multiply<Op, Output::kAccumulate>({C, V, count, constant(rows_q), constant(rows_g)}, layout_.s(sum));
  }

  // dk and dv of one piece of a source slot, from the summed dS (both layouts) and dZ:
  //   dphi(k) = dS^T v + dZ    dv = dS phi(k)
  void source_gradients(const LinearGradients& g, Piece piece, const Real* state, const Tile<Op>& t) const {
    const int64_t C = p_.channels, V = p_.value_channels;
    const View &dk = g.keys[piece.slot], &dv = g.values[piece.slot];
    const Panels<Real> k = panelled<Op>(t.q, C), v = panelled<Op>(t.g, V), before = panelled<Op>(t.before_map, C);
    const Panels<const Real> by_value{state + layout_.size(), C, kPanel<Op>};
    for (int64_t n = piece.begin, end = n + piece.count; n < end; n += tile_) {
      const int64_t count = min64(tile_, end - n), width = whole(count) * C;
      load_channels<Op>(p_.dtype, p_.keys[piece.slot], piece.row, n, count, 0, C, before);
      if (dv.data) {
        const Panels<Real> gradient = panelled<Op>(t.w, V);
        std::memcpy(t.q, t.before_map, sizeof(Real) * static_cast<size_t>(width));
        apply_feature_map(p_.feature_map, t.q, width);
        multiply<Op, Output::kReal>({V, count, C, layout_.s(state), constant(k)}, gradient);
        store_channels<Op>(constant(gradient), t.ones, 0, V, count, p_.dtype, dv, piece.row, n);
      }
      if (dk.data) {
        const Panels<Real> gradient = panelled<Op>(t.w, C);
        load_channels<Op>(p_.dtype, p_.values[piece.slot], piece.row, n, count, 0, V, v);
        multiply<Op, Output::kReal>({C, count, V, by_value, constant(v), layout_.z(state)}, gradient);
        multiply_by_derivative(p_.feature_map, t.before_map, t.w, width);
        store_channels<Op>(constant(gradient), t.ones, 0, C, count, p_.dtype, dk, piece.row, n);
      }
    }
  }

  const LinearProblem& p_;
  int threads_;
  StateLayout<Op> layout_;
  int64_t tile_, tile_bytes_;
  Scratch tiles_;
};

}  // namespace

void linear_forward(const LinearProblem& problem, int threads) {
  if (problem.dtype == Dtype::kFloat64) {
    Linear<Float64>(problem, threads).forward();
  } else {
    Linear<Float32>(problem, threads).forward();
  }
}

void linear_backward(const LinearProblem& problem, const LinearGradients& gradients, int threads) {
  if (problem.dtype == Dtype::kFloat64) {
    Linear<Float64>(problem, threads).backward(gradients);
  } else {
    Linear<Float32>(problem, threads).backward(gradients);
  }
}

}  // namespace XATTN_ISA
}  // namespace xattn
