// The pyramid projection, forward: z = sum_s upsample_s(W_s x_s), out = V relu(scale z + shift) + bias.
//
// A 1x1 convolution commutes with interpolation, so each coarse level is projected at its own resolution
// first. Then the finest level goes through in bands of image rows: for a block of hidden channels, the
// coarse projections are stretched to the band, the finest level's product is added to them in the cache,
// activated, and consumed by the classifier's product. The full-resolution map z exists only as that
// block, unless it is asked for (training).
//
// Matrix layouts: hidden channels are rows, tokens lie along the vectors. Limits: a band is at least one
// image row, so a thread's buffers grow with the width of the image.
#include "../pyramid.h"

#include "../math.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

constexpr int64_t kBandBytes = 384 * 1024;    // of the finest level's features in a band
constexpr int64_t kBlockBytes = 128 * 1024;   // of a block of hidden channels in a band
constexpr int64_t kCoarseBytes = 128 * 1024;  // of a coarse level's tile, and of its weights used at a time

// Bands of the finest level and blocks of hidden channels.
template <class Op>
struct Plan {
  using Real = typename Op::Real;
  int64_t height, width, rows, bands, tokens, row, stretched_row, block;

  explicit Plan(const PyramidProblem& p) : height(p.levels[0].height), width(p.levels[0].width) {
    const int64_t real = static_cast<int64_t>(sizeof(Real));
    const int64_t most = max64(kBandBytes / max64(p.levels[0].channels * width * real, 1), 1);
    rows = max64(ceil_div(height, max64(ceil_div(height, most), 1)), 1);
    bands = ceil_div(height, rows);
    tokens = rows * width;
    row = row_length<Op>(tokens);
    stretched_row = row_length<Op>(width);
    block = max64(kBlockBytes / (row * real), kRows<Op>);
    block = min64(block - block % kRows<Op>, round_up(p.hidden, kRows<Op>));
  }
  // Room for the rows of a coarse level that a band reads, in its width.
  int64_t stretched(const Level& level) const {
    return min64(ceil_div(rows * level.height, height) + 2, level.height) * stretched_row;
  }
};

// A coarse level's interpolation and projection (hidden, tokens).
template <class Op>
struct Coarse {
  using Real = typename Op::Real;
  Taps<Real> rows, columns;
  Panels<Real> projected;
};

// What all threads read: weights as units, the coarse levels.
template <class Op>
struct Shared {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  const Unit** weights;  // one k-major (channels, hidden) matrix a level
  const Unit* classifier;
  Coarse<Op>* coarse;  // one a level, the first of which is not used
  Real* ones;          // as many as a band has tokens

  Shared(Arena& arena, const PyramidProblem& p, const Plan<Op>& plan, bool project)
      : weights(arena.take<const Unit*>(p.levels.size)),
        classifier(units(arena, p.classifier, p.hidden, p.outputs)),
        coarse(arena.take<Coarse<Op>>(p.levels.size)),
        ones(arena.take<Real>(plan.tokens)) {
    for (int64_t n = 0; n < plan.tokens && !arena.counts(); ++n) ones[n] = Real(1);
    for (int64_t s = 0; project && s < p.levels.size; ++s) {
      const Level& level = p.levels[s];
      const Unit* weight = units(arena, level.weight, level.channels, p.hidden);
      if (!arena.counts()) weights[s] = weight;
      if (s == 0) continue;
      const int64_t row = row_length<Op>(level.x.tokens);
      Real* projected = arena.take<Real>(p.hidden * row);
      const Coarse<Op> made{Taps<Real>::make(arena, level.height, p.levels[0].height),
                            Taps<Real>::make(arena, level.width, p.levels[0].width),
                            row_major<Op>(projected, level.x.tokens)};
      if (!arena.counts()) coarse[s] = made;
    }
  }

  // A (rows, columns) matrix of Reals, or pairs of its rows.
  static const Unit* units(Arena& arena, const void* matrix, int64_t rows, int64_t columns) {
    const Real* from = static_cast<const Real*>(matrix);
    if constexpr (Op::kDepth == 1) {
      return from;
    } else {
      Unit* to = arena.take<Unit>(ceil_div(rows, Op::kDepth) * columns);
      for (int64_t k = 0; !arena.counts() && from && k < rows; k += Op::kDepth) {
        for (int64_t c = 0; c < columns; ++c) {
          const Real pair[2] = {from[k * columns + c], k + 1 < rows ? from[(k + 1) * columns + c] : Real(0)};
          to[k / Op::kDepth * columns + c] = make_unit<Op>(pair);
        }
      }
      return to;
    }
  }
};

// What a thread works in.
template <class Op>
struct Buffers {
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;
  Unit *x, *activated;
  Real *z, *output, *stretched, *sample_row;

  Buffers(Arena& arena, const PyramidProblem& p, const Plan<Op>& plan) {
    int64_t channels = 0, tokens = plan.tokens, samples = 0, stretched_reals = 0;
    for (int64_t s = 0; s < p.levels.size; ++s) {
      channels = max64(channels, p.levels[s].channels);
      samples = max64(samples, p.levels[s].width);
      tokens = max64(tokens, min64(p.levels[s].x.tokens, coarse_tile(p.levels[s])));
      if (s > 0) stretched_reals += plan.stretched(p.levels[s]);
    }
    x = arena.take<Unit>(round_up(tokens, kPanel<Op>) * ceil_div(channels, Op::kDepth));
    z = arena.take<Real>(plan.block * plan.row + kPanel<Op>);
    activated = Op::kDepth == 1 ? reinterpret_cast<Unit*>(z) : arena.take<Unit>(plan.block / Op::kDepth * plan.row);
    output = arena.take<Real>(p.outputs * plan.row + kPanel<Op>);
    stretched = arena.take<Real>(stretched_reals);
    sample_row = arena.take<Real>(samples + kStretchPad);
  }
  static int64_t coarse_tile(const Level& level) { return tile_tokens<Op>(level.channels, Op::kDepth * kCoarseBytes); }
};

template <class Op>
class Pyramid {
 public:
  using Unit = typename Op::Unit;
  using Real = typename Op::Real;

  // Of the levels; or, unless `project`, of a stored map.
  Pyramid(const PyramidProblem& problem, bool project, int threads)
      : p_(problem),
        project_(project),
        threads_(threads),
        plan_(problem),
        scale_(static_cast<const Real*>(problem.scale)),
        shift_(static_cast<const Real*>(problem.shift)),
        shared_memory_(bytes_of<Shared<Op>>(problem, plan_, project)),
        shared_(make_shared()),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Buffers<Op>>(problem, plan_)), 64)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))),
        moments_memory_(sizeof(Real) *
                        static_cast<size_t>(problem.mean ? 2 * problem.hidden * problem.batch * plan_.bands : 0)) {}

  void run() {
    for (int64_t b = 0; b < p_.batch; ++b) {
      if (project_) project_coarse(b);
      parallel_for(plan_.bands, threads_, [&](int64_t band, int worker) { run_band(b, band, tile(worker)); });
    }
    if (p_.mean) merge_moments();
  }

 private:
  Shared<Op> make_shared() {
    Arena arena(shared_memory_.data());
    return Shared<Op>(arena, p_, plan_, project_);
  }
  Buffers<Op> tile(int worker) const {
    Arena arena(tiles_.data() + worker * tile_bytes_);
    return Buffers<Op>(arena, p_, plan_);
  }
  // Columns of the weights, or of the classifier's rows, from one on.
  static Panels<const Unit> matrix(const Unit* units, int64_t columns) {
    return {units, static_cast<ptrdiff_t>(columns), kPanel<Op>};
  }

  void project_coarse(int64_t b) const {
    int64_t tasks = 0;
    for (int64_t s = 1; s < p_.levels.size; ++s) tasks += tiles_of(s);
    parallel_for(tasks, threads_, [&](int64_t index, int worker) {
      int64_t s = 1;
      for (; index >= tiles_of(s); ++s) index -= tiles_of(s);
      const Level& level = p_.levels[s];
      const int64_t step = tile_step(s), begin = index * step, count = min64(step, level.x.tokens - begin);
      const int64_t depth = ceil_div(level.channels, Op::kDepth);
      const Buffers<Op> t = tile(worker);
      load_features<Op>(p_.dtype, level.x, b, begin, count, level.channels, t.x);
      const int64_t rows = max64(kCoarseBytes / (depth * int64_t(sizeof(Unit))) / 8 * 8, 8);
      for (int64_t m = 0; m < p_.hidden; m += rows) {
        Product<Op> product{min64(rows, p_.hidden - m), count, depth, matrix(shared_.weights[s] + m, p_.hidden),
                            constant(panelled<Op>(t.x, depth))};
        Panels<Real> to = shared_.coarse[s].projected;
        to.data += m * to.row + begin;
        multiply<Op, Output::kReal>(product, to);
      }
    });
  }
  int64_t tile_step(int64_t s) const {
    return even_tile<Op>(p_.levels[s].x.tokens, Buffers<Op>::coarse_tile(p_.levels[s]));
  }
  int64_t tiles_of(int64_t s) const { return ceil_div(p_.levels[s].x.tokens, tile_step(s)); }

  void run_band(int64_t b, int64_t band, const Buffers<Op>& t) const {
    const int64_t first_row = band * plan_.rows, last_row = min64(first_row + plan_.rows, plan_.height);
    const int64_t begin = first_row * plan_.width, count = (last_row - first_row) * plan_.width;
    const int64_t depth = ceil_div(p_.levels[0].channels, Op::kDepth);
    if (project_) load_features<Op>(p_.dtype, p_.levels[0].x, b, begin, count, p_.levels[0].channels, t.x);
    if (p_.output.data) start_output(count, t);
    for (int64_t m = 0; m < p_.hidden; m += plan_.block) {
      const int64_t rows = min64(plan_.block, p_.hidden - m);
      if (project_) {
        add_coarse(m, rows, first_row, last_row, t);
        multiply<Op, Output::kAccumulate>(
            {rows, count, depth, matrix(shared_.weights[0] + m, p_.hidden), constant(panelled<Op>(t.x, depth))},
            Panels<Real>{t.z, static_cast<ptrdiff_t>(plan_.row), kPanel<Op>});
        if (p_.map) move_map<true>(b, m, rows, begin, count, t);
        if (p_.mean) add_moments(b, band, m, rows, count, t);
      } else {
        move_map<false>(b, m, rows, begin, count, t);
      }
      if (p_.output.data) classify(m, rows, count, t);
    }
    if (p_.output.data) {
      const Panels<const Real> output{t.output, static_cast<ptrdiff_t>(plan_.row), kPanel<Op>};
      store_channels<Op>(output, shared_.ones, 0, p_.outputs, count, p_.dtype, p_.output, b, begin);
    }
  }

  // z = the coarse levels at the rows of a band. Vectors past the end of a row are written over by the next.
  void add_coarse(int64_t m, int64_t rows, int64_t first_row, int64_t last_row, const Buffers<Op>& t) const {
    if (p_.levels.size == 1) std::memset(t.z, 0, sizeof(Real) * static_cast<size_t>(rows * plan_.row));
    for (int64_t i = 0; i < rows && p_.levels.size > 1; ++i) {
      Real* stretched = t.stretched;
      for (int64_t s = 1; s < p_.levels.size; stretched += plan_.stretched(p_.levels[s++])) {
        const Coarse<Op>& coarse = shared_.coarse[s];
        const int64_t width = p_.levels[s].width, top = coarse.rows.first[first_row];
        const Real* image = coarse.projected.data + (m + i) * coarse.projected.row;
        for (int64_t y = top; y <= coarse.rows.last(last_row - 1); ++y) {
          std::memcpy(t.sample_row, image + y * width, sizeof(Real) * static_cast<size_t>(width));
          for (int64_t x = 0; x < kStretchPad; ++x) t.sample_row[width + x] = t.sample_row[width - 1];
          stretch(coarse.columns, t.sample_row, stretched + (y - top) * plan_.stretched_row);
        }
      }
      for (int64_t r = first_row; r < last_row; ++r) {
        Real* to = t.z + i * plan_.row + (r - first_row) * plan_.width;
        stretched = t.stretched;
        for (int64_t s = 1; s < p_.levels.size; stretched += plan_.stretched(p_.levels[s++])) {
          const Taps<Real>& taps = shared_.coarse[s].rows;
          const int64_t top = taps.first[first_row];
          const Real* upper = stretched + (taps.first[r] - top) * plan_.stretched_row;
          const Real* lower = stretched + (taps.last(r) - top) * plan_.stretched_row;
          if (s == 1) {
            blend<false>(upper, lower, taps.left[r], taps.right[r], plan_.width, to);
          } else {
            blend<true>(upper, lower, taps.left[r], taps.right[r], plan_.width, to);
          }
        }
      }
    }
  }

  // A block of z to the map or from it.
  template <bool kStore>
  void move_map(int64_t b, int64_t m, int64_t rows, int64_t begin, int64_t count, const Buffers<Op>& t) const {
    with_storage<Real>(p_.dtype, [&](auto storage) {
      using S = decltype(storage);
      for (int64_t i = 0; i < rows; ++i) {
        S* map = static_cast<S*>(p_.map) + (b * p_.hidden + m + i) * p_.levels[0].x.tokens + begin;
        Real* z = t.z + i * plan_.row;
        if constexpr (kStore) {
          round_row(z, shared_.ones, count, map);
        } else {
          for (int64_t n = 0; n < count; ++n) z[n] = to_float(map[n]);
        }
      }
    });
  }

  void start_output(int64_t count, const Buffers<Op>& t) const {
    const Real* bias = static_cast<const Real*>(p_.classifier_bias);
    for (int64_t o = 0; o < p_.outputs; ++o)
      for (int64_t n = 0; n < count; n += kLanes<Real>) store(t.output + o * plan_.row + n, splat(bias[o]));
  }

  // output += V relu(scale z + shift) for a block of z.
  void classify(int64_t m, int64_t rows, int64_t count, const Buffers<Op>& t) const {
    const Vec<Real> zero{};
    for (int64_t i = 0; i < rows; i += Op::kDepth) {
      const Real* z = t.z + i * plan_.row;
      const Vec<Real> scale = splat(scale_[m + i]), shift = splat(shift_[m + i]);
      if constexpr (Op::kDepth == 1) {
        for (int64_t n = 0; n < count; n += kLanes<Real>)
          store(t.z + i * plan_.row + n, at_least(zero, scale * load(z + n) + shift));
      } else {
#ifdef XATTN_HAVE_BFLOAT16_DOT
        const bool last = i + 1 == rows;
        const Real* odd_z = last ? z : z + plan_.row;
        const Vec<Real> odd_scale = splat(last ? Real(0) : scale_[m + i + 1]);
        const Vec<Real> odd_shift = splat(last ? Real(0) : shift_[m + i + 1]);
        for (int64_t n = 0; n < count; n += kLanes<Real>) {
          const Vec<Real> odd = last ? zero : at_least(zero, odd_scale * load(odd_z + n) + odd_shift);
          store(t.activated + i / 2 * plan_.row + n, make_pairs(at_least(zero, scale * load(z + n) + shift), odd));
        }
#endif
      }
    }
    const Panels<const Unit> activated{t.activated, static_cast<ptrdiff_t>(plan_.row), kPanel<Op>};
    multiply<Op, Output::kAccumulate>({p_.outputs, count, ceil_div(rows, Op::kDepth),
                                       matrix(shared_.classifier + m / Op::kDepth * p_.outputs, p_.outputs), activated},
                                      Panels<Real>{t.output, static_cast<ptrdiff_t>(plan_.row), kPanel<Op>});
  }

  // Mean and squared deviations of each channel in a band, (batch, bands, 2, hidden).
  Real* moments(int64_t b, int64_t band) const {
    return reinterpret_cast<Real*>(moments_memory_.data()) + (b * plan_.bands + band) * 2 * p_.hidden;
  }
  void add_moments(int64_t b, int64_t band, int64_t m, int64_t rows, int64_t count, const Buffers<Op>& t) const {
    Real* to = moments(b, band) + m;
    for (int64_t i = 0; i < rows; ++i) {
      const Real* z = t.z + i * plan_.row;
      const Real mean = sum_of(z, count, [](auto x) { return x; }) / static_cast<Real>(count);
      to[i] = mean;
      to[p_.hidden + i] = sum_of(z, count, [mean](auto x) { return (x - mean) * (x - mean); });
    }
  }
  // Chan, Golub and LeVeque's update, band by band, in an order of its own.
  void merge_moments() const {
    Real *mean = static_cast<Real*>(p_.mean), *deviations = static_cast<Real*>(p_.deviations);
    for (int64_t m = 0; m < p_.hidden; ++m) {
      double middle = 0, square = 0, number = 0;
      for (int64_t i = 0; i < p_.batch * plan_.bands; ++i) {
        const int64_t first_row = i % plan_.bands * plan_.rows;
        const double count = static_cast<double>(min64(plan_.rows, plan_.height - first_row) * plan_.width);
        const Real* part = moments(i / plan_.bands, i % plan_.bands) + m;
        const double difference = static_cast<double>(part[0]) - middle;
        number += count;
        middle += difference * count / number;
        square += static_cast<double>(part[p_.hidden]) + difference * difference * count * (number - count) / number;
      }
      mean[m] = static_cast<Real>(middle);
      deviations[m] = static_cast<Real>(square);
    }
  }

  const PyramidProblem& p_;
  bool project_;
  int threads_;
  Plan<Op> plan_;
  const Real *scale_, *shift_;
  Scratch shared_memory_;
  Shared<Op> shared_;
  int64_t tile_bytes_;
  Scratch tiles_, moments_memory_;
};

}  // namespace

void pyramid_forward(const PyramidProblem& problem, int threads) {
  with_op(problem.dtype, [&](auto op) { Pyramid<decltype(op)>(problem, true, threads).run(); });
}

void pyramid_classify(const PyramidProblem& problem, int threads) {
  with_op(problem.dtype, [&](auto op) { Pyramid<decltype(op)>(problem, false, threads).run(); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
