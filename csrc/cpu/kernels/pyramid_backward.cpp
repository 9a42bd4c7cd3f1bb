// The pyramid projection, backward, from the stored map z:
//
//   g = [scale z + shift > 0] V^T dout      dV = h dout^T, h = relu(scale z + shift)
//   dz = scale g + slope (z - mean) + offset      dx_s = W_s^T upsample_s^T dz      dW_s = upsample_s^T dz x_s^T
//
// Slope and offset carry the gradient through batch statistics; they depend on the sums of g and g (z - mean)
// over all tokens, which the first of two entry points computes. The second goes through the hidden channels
// in blocks: dz of a block, and its adjoint interpolations, are made channel by channel, then multiplied.
//
// Matrix layouts: hidden channels are rows, tokens lie along the vectors, in panels so that a product over
// channels and one over tokens both read what is close together.
#include "../math.h"
#include "../pyramid.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

constexpr int64_t kChunk = 8;                       // hidden channels of a task
constexpr int64_t kBlockBytes = int64_t{24} << 20;  // of dz on all levels, of a block of hidden channels
constexpr int64_t kTileTokens = 3;                  // panels of tokens of a task

// One level and its adjoint interpolation; `gradient` is upsample^T dz of a block of hidden channels.
template <class Op>
struct Adjoint {
  using Real = typename Op::Real;
  Taps<Real> rows, columns;
  Gather<Real> gather;
  Panels<Real> gradient;         // (block, tokens)
  Panels<Real> features;         // (tokens, channels), or no data
  Panels<Real> x_gradient;       // (channels, tokens), or no data
  Panels<Real> weight_gradient;  // (hidden, channels), or no data
};

template <class Op>
struct Shared {
  using Real = typename Op::Real;
  Panels<Real> grad_output;  // (outputs, tokens)
  Panels<Real> grad_tokens;  // (tokens, outputs)
  Adjoint<Op>* levels;

  Shared(Arena& arena, const PyramidProblem& p, const PyramidGradients& g, int64_t block) {
    const int64_t tokens = p.levels[0].x.tokens, padded = round_up(tokens, kPanel<Op>);
    grad_output = panelled<Op>(arena.take<Real>(p.outputs * padded), p.outputs);
    grad_tokens = row_major<Op>(arena.take<Real>(block ? 0 : tokens * row_length<Op>(p.outputs)), p.outputs);
    levels = arena.take<Adjoint<Op>>(p.levels.size);
    for (int64_t s = 0; block && s < p.levels.size; ++s) {
      const Level& level = p.levels[s];
      const int64_t all = round_up(level.x.tokens, kPanel<Op>), row = row_length<Op>(level.channels);
      Adjoint<Op> made;
      made.rows = Taps<Real>::make(arena, level.height, p.levels[0].height);
      made.columns = Taps<Real>::make(arena, level.width, p.levels[0].width);
      made.gather = Gather<Real>::make(arena, made.columns);
      made.gradient = panelled<Op>(arena.take<Real>(block * all), block);
      const bool weight = g.weights[s] != nullptr, x = g.x[s].data != nullptr;
      made.features = row_major<Op>(weight ? arena.take<Real>(all * row) : nullptr, level.channels);
      made.weight_gradient = row_major<Op>(weight ? arena.take<Real>(p.hidden * row) : nullptr, level.channels);
      made.x_gradient = panelled<Op>(x ? arena.take<Real>(level.channels * all) : nullptr, level.channels);
      if (!arena.counts()) levels[s] = made;
    }
  }
};

template <class Op>
struct Buffers {
  using Real = typename Op::Real;
  int64_t row;
  Real *g, *h;       // (kChunk, tokens)
  Real* classifier;  // (kChunk, outputs)
  Real *vertical, *horizontal, *ones;

  Buffers(Arena& arena, const PyramidProblem& p) : row(row_length<Op>(p.levels[0].x.tokens)) {
    int64_t tallest = 0, most = 0;
    for (int64_t s = 0; s < p.levels.size; ++s) {
      tallest = max64(tallest, p.levels[s].height);
      most = max64(most, p.levels[s].x.tokens);
    }
    g = arena.take<Real>(kChunk * row);
    h = arena.take<Real>(kChunk * row);
    classifier = arena.take<Real>(kChunk * row_length<Op>(p.outputs));
    vertical = arena.take<Real>(tallest * row_length<Op>(p.levels[0].width));
    horizontal = arena.take<Real>(most);
    ones = arena.take<Real>(kTileTokens * kPanel<Op>);
    for (int64_t n = 0; n < kTileTokens * kPanel<Op> && !arena.counts(); ++n) ones[n] = Real(1);
  }
};

template <class Op>
class PyramidBackward {
 public:
  using Real = typename Op::Real;

  // Without `sums` the gradients of levels and weights.
  PyramidBackward(const PyramidProblem& problem, const PyramidGradients& gradients, bool sums, int threads)
      : p_(problem),
        g_(gradients),
        threads_(threads),
        tokens_(problem.levels[0].x.tokens),
        block_(sums ? 0 : block_rows(problem)),
        scale_(static_cast<const Real*>(problem.scale)),
        shift_(static_cast<const Real*>(problem.shift)),
        mean_(static_cast<const Real*>(gradients.mean)),
        slope_(static_cast<const Real*>(gradients.slope)),
        offset_(static_cast<const Real*>(gradients.offset)),
        shared_memory_(bytes_of<Shared<Op>>(problem, gradients, block_)),
        shared_(make_shared()),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Buffers<Op>>(problem)), 64)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))) {}

  void run_sums() {
    Real *sums = static_cast<Real*>(g_.sums), *map_sums = static_cast<Real*>(g_.map_sums);
    Real* classifier = static_cast<Real*>(g_.classifier);
    std::memset(sums, 0, sizeof(Real) * static_cast<size_t>(p_.hidden));
    std::memset(map_sums, 0, sizeof(Real) * static_cast<size_t>(p_.hidden));
    std::memset(classifier, 0, sizeof(Real) * static_cast<size_t>(p_.hidden * p_.outputs));
    for (int64_t b = 0; b < p_.batch; ++b) {
      load_grad_output(b, true);
      parallel_for(ceil_div(p_.hidden, kChunk), threads_, [&](int64_t index, int worker) {
        const int64_t m = index * kChunk, rows = min64(kChunk, p_.hidden - m);
        const Buffers<Op> t = tile(worker);
        gate<true>(b, m, rows, t);
        for (int64_t i = 0; i < rows; ++i) {
          const auto identity = [](auto x) { return x; };
          sums[m + i] += sum_of(t.g + i * t.row, tokens_, identity);
          map_sums[m + i] += sum_of(t.h + i * t.row, tokens_, identity);
        }
        add_classifier(b, m, rows, t, classifier);
      });
    }
  }

  void run() {
    for (int64_t s = 0; s < p_.levels.size; ++s)
      if (g_.weights[s]) clear(shared_.levels[s].weight_gradient, p_.hidden, p_.levels[s].channels);
    for (int64_t b = 0; b < p_.batch; ++b) {
      load_grad_output(b, false);
      load_levels(b);
      for (int64_t m = 0; m < p_.hidden; m += block_) {
        const int64_t rows = min64(block_, p_.hidden - m);
        parallel_for(ceil_div(rows, kChunk), threads_, [&](int64_t index, int worker) {
          const int64_t begin = index * kChunk;
          make_gradient(b, m, begin, min64(kChunk, rows - begin), tile(worker));
        });
        add_level_gradients(m, rows);
        add_weight_gradients(m, rows);
      }
      store_level_gradients(b);
    }
    for (int64_t s = 0; s < p_.levels.size; ++s) store_weight_gradient(s);
  }

 private:
  Shared<Op> make_shared() {
    Arena arena(shared_memory_.data());
    return Shared<Op>(arena, p_, g_, block_);
  }
  Buffers<Op> tile(int worker) const {
    Arena arena(tiles_.data() + worker * tile_bytes_);
    return Buffers<Op>(arena, p_);
  }
  static int64_t block_rows(const PyramidProblem& p) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < p.levels.size; ++s) tokens += p.levels[s].x.tokens;
    const int64_t most = max64(kBlockBytes / (int64_t(sizeof(Real)) * tokens) / kChunk * kChunk, kChunk);
    return round_up(ceil_div(p.hidden, ceil_div(p.hidden, most)), kChunk);
  }
  static int64_t tiles_of(int64_t tokens) { return ceil_div(tokens, kTileTokens * kPanel<Op>); }
  void clear(Panels<Real> matrix, int64_t rows, int64_t columns) const {
    std::memset(matrix.data, 0, sizeof(Real) * static_cast<size_t>(rows * row_length<Op>(columns)));
  }

  void load_grad_output(int64_t b, bool tokens) const {
    parallel_for(tiles_of(tokens_), threads_, [&](int64_t index, int) {
      const int64_t n = index * kTileTokens * kPanel<Op>, count = min64(kTileTokens * kPanel<Op>, tokens_ - n);
      Panels<Real> to = shared_.grad_output;
      to.data += n / kPanel<Op> * to.panel;
      load_channels<Op>(p_.dtype, g_.grad_output, b, n, count, 0, p_.outputs, to);
      if (!tokens) return;
      to = shared_.grad_tokens;
      to.data += n * to.row;
      load_tokens<Op>(p_.dtype, g_.grad_output, b, n, count, 0, p_.outputs, to);
    });
  }

  // Features with tokens as rows; gradients zero.
  void load_levels(int64_t b) const {
    for_tiles([&](int64_t s, int64_t n, int64_t count) {
      const Level& level = p_.levels[s];
      if (g_.weights[s]) {
        Panels<Real> to = shared_.levels[s].features;
        to.data += n * to.row;
        load_tokens<Op>(p_.dtype, level.x, b, n, count, 0, level.channels, to);
      }
      if (g_.x[s].data) {
        const Panels<Real> to = shared_.levels[s].x_gradient;
        std::memset(to.data + n / kPanel<Op> * to.panel, 0,
                    sizeof(Real) * static_cast<size_t>(ceil_div(count, kPanel<Op>) * to.panel));
      }
    });
  }

  // Calls body for tiles of tokens of all levels.
  template <class Body>
  void for_tiles(const Body& body) const {
    int64_t tasks = 0;
    for (int64_t s = 0; s < p_.levels.size; ++s) tasks += tiles_of(p_.levels[s].x.tokens);
    parallel_for(tasks, threads_, [&](int64_t index, int) {
      int64_t s = 0;
      for (; index >= tiles_of(p_.levels[s].x.tokens); ++s) index -= tiles_of(p_.levels[s].x.tokens);
      const int64_t n = index * kTileTokens * kPanel<Op>;
      body(s, n, min64(kTileTokens * kPanel<Op>, p_.levels[s].x.tokens - n));
    });
  }

  // g of hidden channels [m, m + rows), into t.g; and either g (z - mean) or dz, into t.h.
  template <bool kSums>
  void gate(int64_t b, int64_t m, int64_t rows, const Buffers<Op>& t) const {
    std::memset(t.g, 0, sizeof(Real) * static_cast<size_t>(rows * t.row));
    const Real* classifier = static_cast<const Real*>(p_.classifier) + m * p_.outputs;
    Product<Op> product{
        rows, tokens_, p_.outputs, {classifier, 1, kPanel<Op> * p_.outputs}, constant(shared_.grad_output)};
    product.a_column = p_.outputs;
    multiply<Op, Output::kAccumulate>(product, Panels<Real>{t.g, static_cast<ptrdiff_t>(t.row), kPanel<Op>});
    with_map(b, m, rows, [&](int64_t i, auto* map) {
      const Real scale = scale_[m + i], shift = shift_[m + i], mean = mean_[m + i];
      const Real slope = kSums ? Real(0) : slope_[m + i], offset = kSums ? Real(0) : offset_[m + i];
      Real *g = t.g + i * t.row, *h = t.h + i * t.row;
      for (int64_t n = 0; n < tokens_; ++n) {
        const Real z = to_float(map[n]);
        const Real gated = scale * z + shift <= Real(0) ? Real(0) : g[n];
        g[n] = gated;
        h[n] = kSums ? gated * (z - mean) : scale * gated + slope * (z - mean) + offset;
      }
    });
  }
  template <class Body>
  void with_map(int64_t b, int64_t m, int64_t rows, const Body& body) const {
    with_storage<Real>(p_.dtype, [&](auto storage) {
      using S = decltype(storage);
      for (int64_t i = 0; i < rows; ++i) body(i, static_cast<const S*>(p_.map) + (b * p_.hidden + m + i) * tokens_);
    });
  }
  // dV += h dout^T for hidden channels [m, m + rows).
  void add_classifier(int64_t b, int64_t m, int64_t rows, const Buffers<Op>& t, Real* classifier) const {
    with_map(b, m, rows, [&](int64_t i, auto* map) {
      const Real scale = scale_[m + i], shift = shift_[m + i];
      for (int64_t n = 0; n < tokens_; ++n) {
        const Real y = scale * to_float(map[n]) + shift;
        t.h[i * t.row + n] = y < Real(0) ? Real(0) : y;
      }
    });
    const Panels<Real> to = row_major<Op>(t.classifier, p_.outputs);
    clear(to, rows, p_.outputs);
    Product<Op> product{rows, p_.outputs, tokens_, {t.h, 1, kPanel<Op> * t.row}, constant(shared_.grad_tokens)};
    product.a_column = t.row;
    multiply<Op, Output::kAccumulate>(product, to);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t o = 0; o < p_.outputs; ++o) classifier[(m + i) * p_.outputs + o] += to.data[i * to.row + o];
  }

  // dz and its adjoint interpolations for rows [begin, begin + rows) of the block at m.
  void make_gradient(int64_t b, int64_t m, int64_t begin, int64_t rows, const Buffers<Op>& t) const {
    gate<false>(b, m + begin, rows, t);
    const int64_t width = p_.levels[0].width, vertical_row = row_length<Op>(width);
    for (int64_t i = 0; i < rows; ++i) {
      const Real* dz = t.h + i * t.row;
      to_panels(dz, tokens_, begin + i, shared_.levels[0].gradient);
      for (int64_t s = 1; s < p_.levels.size; ++s) {
        const Level& level = p_.levels[s];
        const Adjoint<Op>& adjoint = shared_.levels[s];
        std::memset(t.vertical, 0, sizeof(Real) * static_cast<size_t>(level.height * vertical_row));
        for (int64_t r = 0; r < p_.levels[0].height; ++r) {
          add_row(dz + r * width, adjoint.rows.left[r], width, t.vertical + adjoint.rows.first[r] * vertical_row);
          add_row(dz + r * width, adjoint.rows.right[r], width, t.vertical + adjoint.rows.last(r) * vertical_row);
        }
        for (int64_t r = 0; r < level.height; ++r)
          adjoint.gather.apply(t.vertical + r * vertical_row, t.horizontal + r * level.width);
        to_panels(t.horizontal, level.x.tokens, begin + i, adjoint.gradient);
      }
    }
  }
  static void add_row(const Real* from, Real weight, int64_t count, Real* to) {
    for (int64_t n = 0; n < count; ++n) to[n] += weight * from[n];
  }
  static void to_panels(const Real* from, int64_t count, int64_t row, Panels<Real> to) {
    for (int64_t n = 0; n < count; n += kPanel<Op>)
      std::memcpy(to.data + n / kPanel<Op> * to.panel + row * to.row, from + n,
                  sizeof(Real) * static_cast<size_t>(min64(kPanel<Op>, count - n)));
  }

  // dx_s += W_s^T dy_s for a block of hidden channels.
  void add_level_gradients(int64_t m, int64_t rows) const {
    for_tiles([&](int64_t s, int64_t n, int64_t count) {
      if (!g_.x[s].data) return;
      const Level& level = p_.levels[s];
      const Real* weight = static_cast<const Real*>(level.weight) + m;
      Panels<Real> from = shared_.levels[s].gradient, to = shared_.levels[s].x_gradient;
      from.data += n / kPanel<Op> * from.panel;
      to.data += n / kPanel<Op> * to.panel;
      Product<Op> product{level.channels, count, rows, {weight, 1, kPanel<Op> * p_.hidden}, constant(from)};
      product.a_column = p_.hidden;
      multiply<Op, Output::kAccumulate>(product, to);
    });
  }

  // dW_s += dy_s x_s^T for a block of hidden channels; every thread takes some of them.
  void add_weight_gradients(int64_t m, int64_t rows) const {
    const int64_t step = round_up(ceil_div(rows, max64(threads_, 1)), kChunk), parts = ceil_div(rows, step);
    parallel_for(p_.levels.size * parts, threads_, [&](int64_t index, int) {
      const int64_t s = index / parts, first = index % parts * step;
      if (!g_.weights[s]) return;
      const Level& level = p_.levels[s];
      const Adjoint<Op>& adjoint = shared_.levels[s];
      Panels<Real> to = adjoint.weight_gradient;
      to.data += (m + first) * to.row;
      for (int64_t n = 0; n < level.x.tokens; n += kPanel<Op>) {
        const Real* a = adjoint.gradient.data + n / kPanel<Op> * adjoint.gradient.panel + first * kPanel<Op>;
        Panels<const Real> b = constant(adjoint.features);
        b.data += n * b.row;
        Product<Op> product{min64(step, rows - first),
                            level.channels,
                            min64(kPanel<Op>, level.x.tokens - n),
                            {a, 1, kPanel<Op> * kPanel<Op>},
                            b};
        product.a_column = kPanel<Op>;
        multiply<Op, Output::kAccumulate>(product, to);
      }
    });
  }

  void store_level_gradients(int64_t b) const {
    const Buffers<Op> t = tile(0);
    for_tiles([&](int64_t s, int64_t n, int64_t count) {
      if (!g_.x[s].data) return;
      Panels<const Real> from = constant(shared_.levels[s].x_gradient);
      from.data += n / kPanel<Op> * from.panel;
      store_channels<Op>(from, t.ones, 0, p_.levels[s].channels, count, p_.dtype, g_.x[s], b, n);
    });
  }
  void store_weight_gradient(int64_t s) const {
    if (!g_.weights[s]) return;
    const Panels<Real> from = shared_.levels[s].weight_gradient;
    const int64_t channels = p_.levels[s].channels;
    for (int64_t m = 0; m < p_.hidden; ++m)
      std::memcpy(static_cast<Real*>(g_.weights[s]) + m * channels, from.data + m * from.row,
                  sizeof(Real) * static_cast<size_t>(channels));
  }

  const PyramidProblem& p_;
  const PyramidGradients& g_;
  int threads_;
  int64_t tokens_, block_;
  const Real *scale_, *shift_, *mean_, *slope_, *offset_;
  Scratch shared_memory_;
  Shared<Op> shared_;
  int64_t tile_bytes_;
  Scratch tiles_;
};

}  // namespace

void pyramid_sums(const PyramidProblem& problem, const PyramidGradients& gradients, int threads) {
  with_real(problem.dtype,
            [&](auto op) { PyramidBackward<decltype(op)>(problem, gradients, true, threads).run_sums(); });
}

void pyramid_backward(const PyramidProblem& problem, const PyramidGradients& gradients, int threads) {
  with_real(problem.dtype, [&](auto op) { PyramidBackward<decltype(op)>(problem, gradients, false, threads).run(); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
