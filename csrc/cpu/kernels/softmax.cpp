// Softmax cross-attention, forward and backward, with online softmax: no score matrix in memory.
//
// Orientation: the side that a task owns (queries forward and for dq, keys for dk and dv) lies along the
// vectors, the other side is read in blocks of kBlock tokens. A task owns a tile of several panels, so
// that reading a block is shared by all of them; the scores of a block and one panel, kBlock rows, stay
// in the first-level cache. In this orientation a row maximum is an elementwise one over vectors.
//
// The backward recomputes the weights once per side (seven products instead of five), so that no two
// tasks add to the same gradient. Scores are kept in base 2: s = q.k * scale / ln 2.
//
// A weight's gradient is p (dp - delta) with delta = out . g = sum p dp. Outputs in 16 bits are rounded,
// which peaked weights do not forgive: dp - delta is small where p is not. There the side of the queries
// sums p (dp - delta) as well, which would be zero, and with an eighth product, sum p k, corrects itself; the
// side of the keys, which comes after, is given the corrected delta.
#include "../math.h"
#include "../pack.h"
#include "../pieces.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

constexpr int64_t kTileBytes = 128 * 1024;  // of one matrix of the owned tile
constexpr int64_t kBlock = 128;             // tokens of the other side at a time
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// Matrices of a task. "own": panels of the owned tile; "block": the other side, with channels as rows
// (panels) and with tokens as rows.
template <class Op>
struct Buffers {
  using Real = typename Op::Real;
  Real *own, *own_value, *sum, *sum_value, *average;
  Real *block, *block_value, *block_rows, *block_value_rows;
  Real *weights, *products, *row_lse, *row_delta, *maximum, *total;
  Buffers(Arena& arena, int64_t tokens, int64_t channels, int64_t value_channels) {
    const int64_t padded = round_up(kBlock, kPanel<Op>);
    own = arena.take<Real>(tokens * channels);
    own_value = arena.take<Real>(tokens * value_channels);
    sum = arena.take<Real>(tokens * channels);
    sum_value = arena.take<Real>(tokens * value_channels);
    average = arena.take<Real>(tokens * channels);
    block = arena.take<Real>(padded * channels);
    block_value = arena.take<Real>(padded * value_channels);
    block_rows = arena.take<Real>(kBlock * row_length<Op>(channels));
    block_value_rows = arena.take<Real>(kBlock * row_length<Op>(value_channels));
    weights = arena.take<Real>(kBlock * kPanel<Op>);
    products = arena.take<Real>(kBlock * kPanel<Op>);
    row_lse = arena.take<Real>(max64(tokens, kBlock));
    row_delta = arena.take<Real>(max64(tokens, kBlock));
    maximum = arena.take<Real>(tokens);
    total = arena.take<Real>(tokens);
  }
};

template <class Op>
class Softmax {
 public:
  using Real = typename Op::Real;
  Softmax(const SoftmaxProblem& problem, int threads)
      : p_(problem),
        threads_(threads),
        channels_(problem.channels / problem.heads),
        value_channels_(problem.value_channels / problem.heads),
        tile_(tile_tokens<Op>(max64(channels_, value_channels_), kTileBytes)),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Buffers<Op>>(tile_, channels_, value_channels_)), 64)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))) {}

  void forward() {
    for_tiles(p_.outputs, [&](const Tile& tile, const Buffers<Op>& t) { forward_tile(tile, t); });
  }

  void backward(const SoftmaxGradients& g) {
    Scratch begin_memory(sizeof(int64_t) * static_cast<size_t>(p_.outputs.size));
    delta_begin_ = reinterpret_cast<int64_t*>(begin_memory.data());
    int64_t rows = 0;
    for (int64_t o = 0; o < p_.outputs.size; ++o) {
      delta_begin_[o] = rows;
      rows += p_.batch * p_.heads * p_.outputs[o].tokens;
    }
    Scratch delta_memory(sizeof(Real) * static_cast<size_t>(rows));
    delta_ = reinterpret_cast<Real*>(delta_memory.data());
    for_tiles(p_.outputs, [&](const Tile& tile, const Buffers<Op>& t) { delta_tile(g, tile, t); });
    for_tiles(p_.queries, [&](const Tile& tile, const Buffers<Op>& t) { query_gradient_tile(g, tile, t); });
    for_tiles(p_.keys, [&](const Tile& tile, const Buffers<Op>& t) { key_gradient_tile(g, tile, t); });
  }

 private:
  struct Tile {
    int64_t slot, b, head, begin, count;
  };

  // Calls body for every tile of every (slot, batch entry, head).
  template <class Body>
  void for_tiles(Span<const View> views, const Body& body) const {
    const Pieces pieces(views, p_.batch * p_.heads, [&](int64_t tokens) { return even_tile<Op>(tokens, tile_); });
    parallel_for(pieces.total(), threads_, [&](int64_t index, int worker) {
      const Piece piece = pieces[index];
      Arena arena(tiles_.data() + worker * tile_bytes_);
      body(Tile{piece.slot, piece.row / p_.heads, piece.row % p_.heads, piece.begin, piece.count},
           Buffers<Op>(arena, tile_, channels_, value_channels_));
    });
  }

  // Where a (batch entry, head) of an output starts in its log-sum-exp, and in delta.
  int64_t lse_row(int64_t o, int64_t b, int64_t head) const { return (b * p_.heads + head) * p_.outputs[o].tokens; }
  Real* lse(Span<void* const> pointers, int64_t o, int64_t b, int64_t head) const {
    return static_cast<Real*>(pointers[o]) + lse_row(o, b, head);
  }
  Real* delta(int64_t o, int64_t b, int64_t head) const { return delta_ + delta_begin_[o] + lse_row(o, b, head); }

  // A head's channels of a token range: channels as rows in panels, or tokens as rows.
  void read_panels(const View& view, const Tile& tile, int64_t begin, int64_t count, int64_t channels, Real* to) const {
    load_channels<Op>(p_.dtype, view, tile.b, begin, count, tile.head * channels, channels, panelled<Op>(to, channels));
  }
  void read_rows(const View& view, const Tile& tile, int64_t begin, int64_t count, int64_t channels, Real* to) const {
    load_tokens<Op>(p_.dtype, view, tile.b, begin, count, tile.head * channels, channels, row_major<Op>(to, channels));
  }
  void write_panels(const Real* from, const Real* factors, int64_t channels, const View& view, const Tile& tile) const {
    store_channels<Op>(panelled<Op>(from, channels), factors, tile.head * channels, channels, tile.count, p_.dtype,
                       view, tile.b, tile.begin);
  }
  static void scale(Real* x, int64_t count, double factor) {
    for (int64_t i = 0; i < count; i += kLanes<Real>) store(x + i, load(x + i) * static_cast<Real>(factor));
  }
  static void fill(Real* x, int64_t count, double value) {
    for (int64_t i = 0; i < count; ++i) x[i] = static_cast<Real>(value);
  }
  static void clear(Real* x, int64_t count) { std::memset(x, 0, sizeof(Real) * static_cast<size_t>(count)); }

  // rows x panel = sum over channels of block (channels, rows) and a panel of the owned tile.
  void score(const Real* block, const Real* own, int64_t panel, int64_t rows, int64_t channels, Real* to) const {
    multiply<Op, Output::kReal>(
        {rows, kPanel<Op>, channels, panelled<Op>(block, channels), panelled<Op>(own + panel * channels, channels)},
        Panels<Real>{to, kPanel<Op>, 0});
  }
  // sum (channels, panel) += rows (rows, channels)^T weights (rows, panel).
  void accumulate(const Real* rows, const Real* weights, int64_t count, int64_t channels, int64_t panel,
                  Real* sum) const {
    multiply<Op, Output::kAccumulate>(
        {channels, kPanel<Op>, count, row_major<Op>(rows, channels), Panels<const Real>{weights, kPanel<Op>, 0}},
        panelled<Op>(sum + panel * channels, channels));
  }

  void forward_tile(const Tile& tile, const Buffers<Op>& t) const {
    const int64_t width = round_up(tile.count, kPanel<Op>);
    read_panels(p_.queries[p_.edges.query_of(tile.slot)], tile, tile.begin, tile.count, channels_, t.own);
    scale(t.own, width * channels_, p_.scale * kLog2E);
    clear(t.sum_value, width * value_channels_);
    clear(t.total, width);
    fill(t.maximum, width, -INFINITY);
    for (int64_t e = p_.edges.output_begin[tile.slot]; e < p_.edges.output_begin[tile.slot + 1]; ++e) {
      const int64_t j = p_.edges.all[e].source, tokens = p_.keys[j].tokens;
      for (int64_t k = 0; k < tokens; k += kBlock) {
        const int64_t rows = min64(kBlock, tokens - k);
        read_panels(p_.keys[j], tile, k, rows, channels_, t.block);
        read_rows(p_.values[j], tile, k, rows, value_channels_, t.block_value_rows);
        for (int64_t panel = 0; panel < tile.count; panel += kPanel<Op>) {
          score(t.block, t.own, panel, rows, channels_, t.weights);
          online_softmax(t, panel, rows);
          accumulate(t.block_value_rows, t.weights, rows, value_channels_, panel, t.sum_value);
        }
      }
    }
    Real* out_lse = lse(p_.lse, tile.slot, tile.b, tile.head) + tile.begin;
    for (int64_t n = 0; n < tile.count; ++n) {
      const bool empty = t.total[n] == 0;  // no keys: the output is 0
      out_lse[n] = empty ? -static_cast<Real>(INFINITY)
                         : static_cast<Real>((t.maximum[n] + ::log2(static_cast<double>(t.total[n]))) * kLn2);
      t.total[n] = empty ? Real(0) : Real(1) / t.total[n];
    }
    write_panels(t.sum_value, t.total, value_channels_, p_.outputs[tile.slot], tile);
  }

  // Scores of a block to weights against the new maximum; old sums are rescaled to it.
  void online_softmax(const Buffers<Op>& t, int64_t panel, int64_t rows) const {
    for (int64_t n = 0; n < kPanel<Op>; n += kLanes<Real>) {
      Real* score = t.weights + n;
      const Vec<Real> before = load(t.maximum + panel + n);
      Vec<Real> maximum = before;
      for (int64_t r = 0; r < rows; ++r) maximum = at_least(maximum, load(score + r * kPanel<Op>));
      const Vec<Real> correction = exp2_weight(before - maximum);
      Vec<Real> total{};
      for (int64_t r = 0; r < rows; ++r) {
        const Vec<Real> weight = exp2_weight(load(score + r * kPanel<Op>) - maximum);
        store(score + r * kPanel<Op>, weight);
        total += weight;
      }
      store(t.maximum + panel + n, maximum);
      store(t.total + panel + n, load(t.total + panel + n) * correction + total);
      Real* sum = t.sum_value + panel * value_channels_ + n;
      for (int64_t v = 0; v < value_channels_; ++v)
        store(sum + v * kPanel<Op>, load(sum + v * kPanel<Op>) * correction);
    }
  }

  // delta = sum_v out g - grad_lse, by which a weight's gradient is p (dp - delta).
  void delta_tile(const SoftmaxGradients& g, const Tile& tile, const Buffers<Op>& t) const {
    const int64_t o = tile.slot;
    Real* to = delta(o, tile.b, tile.head) + tile.begin;
    clear(t.total, tile.count);
    if (g.grad_outputs[o].data) {
      read_panels(p_.outputs[o], tile, tile.begin, tile.count, value_channels_, t.own_value);
      read_panels(g.grad_outputs[o], tile, tile.begin, tile.count, value_channels_, t.sum_value);
      for (int64_t n = 0; n < tile.count; n += kLanes<Real>) {
        const Real* out = column<Op>(panelled<Op>(t.own_value, value_channels_), n);
        const Real* grad = column<Op>(panelled<Op>(t.sum_value, value_channels_), n);
        Vec<Real> sum{};
        for (int64_t v = 0; v < value_channels_; ++v) sum += load(out + v * kPanel<Op>) * load(grad + v * kPanel<Op>);
        store(t.total + n, sum);
      }
    }
    const bool has_lse = g.grad_lse[o] != nullptr;
    for (int64_t n = 0; n < tile.count; ++n)
      to[n] = t.total[n] - (has_lse ? lse(g.grad_lse, o, tile.b, tile.head)[tile.begin + n] : Real(0));
  }

  bool wanted(const SoftmaxGradients& g, int64_t o) const { return g.grad_outputs[o].data || g.grad_lse[o]; }

  // log-sum-exp in base 2 and delta of a range of an output's queries.
  void read_statistics(int64_t o, const Tile& tile, int64_t begin, int64_t count, const Buffers<Op>& t) const {
    const Real *from = lse(p_.lse, o, tile.b, tile.head) + begin, *d = delta(o, tile.b, tile.head) + begin;
    for (int64_t n = 0; n < count; ++n) {
      t.row_lse[n] = static_cast<Real>(from[n] * kLog2E);
      t.row_delta[n] = d[n];
    }
  }
  void read_gradient(const SoftmaxGradients& g, int64_t o, const Tile& tile, int64_t begin, int64_t count, Real* panels,
                     Real* rows) const {
    if (!g.grad_outputs[o].data) {
      clear(panels, round_up(count, kPanel<Op>) * value_channels_);
      if (rows) clear(rows, count * row_length<Op>(value_channels_));
      return;
    }
    read_panels(g.grad_outputs[o], tile, begin, count, value_channels_, panels);
    if (rows) read_rows(g.grad_outputs[o], tile, begin, count, value_channels_, rows);
  }

  void query_gradient_tile(const SoftmaxGradients& g, const Tile& tile, const Buffers<Op>& t) const {
    const View& dq = g.queries[tile.slot];
    const bool rounded = p_.dtype == Dtype::kBFloat16 || p_.dtype == Dtype::kFloat16;
    if (!dq.data && !rounded) return;
    const int64_t width = round_up(tile.count, kPanel<Op>);
    read_panels(p_.queries[tile.slot], tile, tile.begin, tile.count, channels_, t.own);
    scale(t.own, width * channels_, p_.scale * kLog2E);
    clear(t.sum, width * channels_);
    for (int64_t e = p_.edges.query_begin[tile.slot]; e < p_.edges.query_begin[tile.slot + 1]; ++e) {
      const int64_t index = p_.edges.by_query[e], o = p_.edges.all[index].output, j = p_.edges.all[index].source;
      const int64_t tokens = p_.keys[j].tokens;
      if (!wanted(g, o)) continue;
      if (index == p_.edges.output_begin[o]) {
        read_gradient(g, o, tile, tile.begin, tile.count, t.own_value, nullptr);
        read_statistics(o, tile, tile.begin, tile.count, t);
        for (int64_t n = tile.count; n < width; ++n) t.row_lse[n] = t.row_delta[n] = 0;
        clear(t.total, width);
        clear(t.average, width * channels_);
      }
      for (int64_t k = 0; k < tokens; k += kBlock) {
        const int64_t rows = min64(kBlock, tokens - k);
        read_panels(p_.keys[j], tile, k, rows, channels_, t.block);
        read_panels(p_.values[j], tile, k, rows, value_channels_, t.block_value);
        read_rows(p_.keys[j], tile, k, rows, channels_, t.block_rows);
        for (int64_t panel = 0; panel < tile.count; panel += kPanel<Op>) {
          score(t.block, t.own, panel, rows, channels_, t.weights);
          score(t.block_value, t.own_value, panel, rows, value_channels_, t.products);
          for (int64_t n = 0; n < kPanel<Op>; n += kLanes<Real>) {
            const Vec<Real> row_lse = load(t.row_lse + panel + n), row_delta = load(t.row_delta + panel + n);
            Vec<Real> total{};
            for (int64_t r = 0; r < rows; ++r) {
              const int64_t at = r * kPanel<Op> + n;
              const Vec<Real> weight = exp2_weight(load(t.weights + at) - row_lse);
              const Vec<Real> gradient = weight * (load(t.products + at) - row_delta);
              store(t.weights + at, weight);
              store(t.products + at, gradient);
              total += gradient;
            }
            store(t.total + panel + n, load(t.total + panel + n) + total);
          }
          if (!dq.data) continue;
          accumulate(t.block_rows, t.products, rows, channels_, panel, t.sum);
          if (rounded) accumulate(t.block_rows, t.weights, rows, channels_, panel, t.average);
        }
      }
      if (rounded && index + 1 == p_.edges.output_begin[o + 1]) correct(g, o, tile, t);
    }
    if (!dq.data) return;
    fill(t.total, width, p_.scale);
    write_panels(t.sum, t.total, channels_, dq, tile);
  }

  // delta += sum p (dp - delta), of which the gradient of log-sum-exp is a part, and what follows from it for
  // the gradient of the queries.
  void correct(const SoftmaxGradients& g, int64_t o, const Tile& tile, const Buffers<Op>& t) const {
    const Real* grad_lse = g.grad_lse[o] ? lse(g.grad_lse, o, tile.b, tile.head) + tile.begin : nullptr;
    Real* d = delta(o, tile.b, tile.head) + tile.begin;
    for (int64_t n = 0; n < tile.count; ++n) {
      const bool empty = t.row_lse[n] == -static_cast<Real>(INFINITY);  // no keys
      t.total[n] = empty ? Real(0) : t.total[n] - (grad_lse ? grad_lse[n] : Real(0));
      d[n] += t.total[n];
    }
    for (int64_t n = 0; n < tile.count; n += kLanes<Real>) {
      const Vec<Real> shift = load(t.total + n);
      Real* sum = column<Op>(panelled<Op>(t.sum, channels_), n);
      const Real* average = column<Op>(panelled<Op>(t.average, channels_), n);
      for (int64_t c = 0; c < channels_ * kPanel<Op>; c += kPanel<Op>)
        store(sum + c, load(sum + c) - shift * load(average + c));
    }
  }

  void key_gradient_tile(const SoftmaxGradients& g, const Tile& tile, const Buffers<Op>& t) const {
    const View &dk = g.keys[tile.slot], &dv = g.values[tile.slot];
    if (!dk.data && !dv.data) return;
    const int64_t width = round_up(tile.count, kPanel<Op>);
    read_panels(p_.keys[tile.slot], tile, tile.begin, tile.count, channels_, t.own);
    scale(t.own, width * channels_, p_.scale * kLog2E);
    read_panels(p_.values[tile.slot], tile, tile.begin, tile.count, value_channels_, t.own_value);
    clear(t.sum, width * channels_);
    clear(t.sum_value, width * value_channels_);
    for (int64_t e = p_.edges.source_begin[tile.slot]; e < p_.edges.source_begin[tile.slot + 1]; ++e) {
      const Edge& edge = p_.edges.all[p_.edges.by_source[e]];
      const int64_t o = edge.output, i = edge.query, tokens = p_.queries[i].tokens;
      if (!wanted(g, o)) continue;
      for (int64_t m = 0; m < tokens; m += kBlock) {
        const int64_t rows = min64(kBlock, tokens - m);
        read_panels(p_.queries[i], tile, m, rows, channels_, t.block);
        read_rows(p_.queries[i], tile, m, rows, channels_, t.block_rows);
        read_gradient(g, o, tile, m, rows, t.block_value, t.block_value_rows);
        read_statistics(o, tile, m, rows, t);
        for (int64_t panel = 0; panel < tile.count; panel += kPanel<Op>) {
          score(t.block, t.own, panel, rows, channels_, t.weights);
          score(t.block_value, t.own_value, panel, rows, value_channels_, t.products);
          for (int64_t at = 0; at < rows * kPanel<Op>; at += kLanes<Real>) {
            const int64_t r = at / kPanel<Op>;
            const Vec<Real> weight = exp2_weight(load(t.weights + at) - splat(t.row_lse[r]));
            store(t.weights + at, weight);
            store(t.products + at, weight * (load(t.products + at) - splat(t.row_delta[r])));
          }
          if (dv.data) accumulate(t.block_value_rows, t.weights, rows, value_channels_, panel, t.sum_value);
          if (dk.data) accumulate(t.block_rows, t.products, rows, channels_, panel, t.sum);
        }
      }
    }
    fill(t.total, width, p_.scale);
    if (dk.data) write_panels(t.sum, t.total, channels_, dk, tile);
    fill(t.total, width, 1);
    if (dv.data) write_panels(t.sum_value, t.total, value_channels_, dv, tile);
  }

  const SoftmaxProblem& p_;
  int threads_;
  int64_t channels_, value_channels_;  // of one head
  int64_t tile_, tile_bytes_;
  Scratch tiles_;
  Real* delta_ = nullptr;
  int64_t* delta_begin_ = nullptr;
};

}  // namespace

void softmax_forward(const SoftmaxProblem& problem, int threads) {
  if (problem.dtype == Dtype::kFloat64) {
    Softmax<Float64>(problem, threads).forward();
  } else {
    Softmax<Float32>(problem, threads).forward();
  }
}

void softmax_backward(const SoftmaxProblem& problem, const SoftmaxGradients& gradients, int threads) {
  if (problem.dtype == Dtype::kFloat64) {
    Softmax<Float64>(problem, threads).backward(gradients);
  } else {
    Softmax<Float32>(problem, threads).backward(gradients);
  }
}

}  // namespace XATTN_ISA
}  // namespace xattn
