// Backward passes of the cross-attention block in training. Every pass computes the projections of a tile
// from its features again; the gradient of q^ and k^ times their slopes ends in one matrix of the tile.
#include "../training.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

enum class Slope { kStored, kAlone, kWithValue };

template <class Op>
class Backward : Training<Op> {
  using Base = Training<Op>;
  using Base::channels_;
  using Base::kW;
  using Base::p_;
  using Base::pieces_;
  using Base::row_;
  using Base::threads_;
  using typename Base::Matrix;
  using typename Base::Real;
  using typename Base::Tile;

 public:
  // `layers` is the number of first layers of a pair.
  Backward(const TrainingProblem& problem, int64_t layers, int threads)
      : Base(problem, false, threads),
        layers_(layers),
        first_(problem.first, layers * problem.pairs.size(), problem.channels, threads),
        second_(problem.second, problem.pairs.size(), problem.channels, threads),
        scaled_(sizeof(Real) *
                static_cast<size_t>(layers * problem.pairs.size() * problem.channels * problem.channels)) {
    Real* to = reinterpret_cast<Real*>(scaled_.data());
    const int64_t C = channels_;
    parallel_for(layers * p_.pairs.size(), threads, [&](int64_t layer, int) {
      const Real *scale = Base::vector(p_.first_affine, 2 * layer), *from = Base::matrix(p_.first, layer).data;
      for (int64_t i = 0; i < C * C; ++i) to[layer * C * C + i] = scale[i / C] * from[i];
    });
  }

  void target_sums(const TrainingResults& results) const {
    const int64_t C = channels_, outputs = p_.outputs.size();
    const Partials<Real> sums = Base::template pair_partials<Real>(2 * C);
    const Partials<Real> states(pieces_, p_.batch, outputs, C * row_ + C,
                                [&](int64_t o) { return p_.pairs.group[p_.outputs.group[o]]; });
    Base::for_pieces(true, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = p_.pairs.members[i];
        sums.cleared(pair, piece);
        for (int64_t j = p_.outputs.begin[pair]; j < p_.outputs.begin[pair + 1]; ++j)
          states.cleared(p_.outputs.members[j], piece);
      }
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, t);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = p_.pairs.members[i];
          query_gradient(piece, pair, n, count, t, &states);
          add_sums<Slope::kStored>(pair, count, t, sums.at(pair, piece.row, piece.part));
        }
      });
    });
    parallel_for(outputs * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t o = index / p_.batch, parts = states.parts(o);
      const Real* data = states.at(o, index % p_.batch, 0);
      states.sum(data, parts, 0, C, C, row_, static_cast<Real*>(results.state_s) + index * C * C);
      states.sum(data, parts, C * row_, 1, C, C, static_cast<Real*>(results.state_z) + index * C);
    });
    sum_pairs(sums, 0, 2, C, results.sums);
  }

  void target_gradients(const TrainingResults& results) const {
    layer_gradients(results, [&](const Piece& piece, int64_t pair, int64_t n, int64_t count, const Tile& t) {
      query_gradient(piece, pair, n, count, t, nullptr);
      normalise<Slope::kStored>(pair, count, t);
    });
  }

  void source_sums(const TrainingResults& results) const {
    const int64_t C = channels_;
    const Transposed<Op> transposed(p_.state_s, p_.pairs.size() * p_.batch, C, threads_);
    const Partials<Real> partials = Base::template pair_partials<Real>(3 * C);
    const Partials<double> products = Base::template pair_partials<double>(C * row_);
    for_gradient_tiles([&](const Piece& piece, int64_t pair, bool first, int64_t n, int64_t count, const Tile& t) {
      if (n == piece.begin) {
        partials.cleared(pair, piece);
        products.cleared(pair, piece);
      }
      Real* partial = partials.at(pair, piece.row, piece.part);
      key_gradient(piece, pair, count, t);
      add_sums<Slope::kWithValue>(pair, count, t, partial + C);
      Base::project(transposed[pair * p_.batch + piece.row], nullptr, t.activated, count, t.through);
      mask(t.value, t.through, count, partial);
      Base::add_outer_of_input(pair, t.through, count, t, products.at(pair, piece.row, piece.part));
      add_to_input(2 * pair + 1, first, piece, count, t);
    });
    sum_pairs(products, 0, C, row_, results.first);
    sum_pairs(partials, 0, 1, C, results.bias);
    sum_pairs(partials, C, 2, C, results.sums);
  }

  void source_gradients(const TrainingResults& results) const {
    layer_gradients(results, [&](const Piece& piece, int64_t pair, int64_t, int64_t count, const Tile& t) {
      key_gradient(piece, pair, count, t);
      normalise<Slope::kAlone>(pair, count, t);
    });
  }

 private:
  bool wanted(const Piece& piece) const { return p_.grad_features[piece.slot].data != nullptr; }

  // Calls body for every pair of every tile, whose features are there as rows as well, and adds what the pairs
  // of a slot leave in t.grad_x to the gradient of its features.
  template <class Body>
  void for_gradient_tiles(const Body& body) const {
    Base::for_pieces(false, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      bool in_double = false;
      for (int64_t i = begin; i < end; ++i) in_double = in_double || Base::precise(p_.pairs.members[i]);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred_rows(piece, n, count, in_double, t);
        for (int64_t i = begin; i < end; ++i) body(piece, p_.pairs.members[i], i == begin, n, count, t);
        if (wanted(piece)) Base::add_gradient(piece, n, count, t);
      });
    });
  }

  // h and the second layer of queries or keys.
  void layers(int64_t pair, int64_t count, const Tile& t) const {
    Base::project_first(first_[layers_ * pair], layers_ * pair, count, t, t.hidden);
    Base::project(second_[pair], nullptr, t.hidden, count, t.second);
  }

  // Gradients of the outputs of a pair to t.total, that of q^; those of states are added to `states`.
  void query_gradient(const Piece& piece, int64_t pair, int64_t n, int64_t count, const Tile& t,
                      const Partials<Real>* states) const {
    layers(pair, count, t);
    Base::template activate<true>(pair, count, t);
    if (states) transpose_to_rows<Op>(constant(t.activated), channels_, count, t.rows);
    for (int64_t j = p_.outputs.begin[pair]; j < p_.outputs.begin[pair + 1]; ++j) {
      const int64_t o = p_.outputs.members[j], state = o * p_.batch + piece.row;
      const Real* z = Base::vector(p_.state_z, state);
      Base::load_panels(p_.maps[o], piece.row, n, count, t.gradient, t.map_rows);
      Base::project(Base::matrix(p_.state_s, state), nullptr, t.gradient, count, t.through);
      divide(z, count, t);
      Real* partial = states ? states->at(o, piece.row, piece.part) : nullptr;
      const bool first = j == p_.outputs.begin[pair];
      for (int64_t c = 0; c < channels_; ++c) {
        const Real factor = z[c];
        Vec<Real> sum{};
        Base::for_row(t.total, c, count, [&](int64_t i, int64_t m) {
          const Vec<Real> weight = load(t.weight + m), share = load(t.share + m);
          const Vec<Real> gradient = load(t.through.data + i) * weight - factor * share;
          store(t.total.data + i, first ? gradient : load(t.total.data + i) + gradient);
          if (partial == nullptr) return;
          store(t.gradient.data + i, load(t.gradient.data + i) * weight);
          sum += share * load(t.activated.data + i);
        });
        if (partial) partial[channels_ * row_ + c] -= sum_lanes<Real>(sum);
      }
      if (partial) Base::add_outer(t.gradient, t.rows, count, partial);
    }
  }
  // With d the denominators: t.weight = 1 / d and t.share = (g . out) / d, zero where d is the clamp's. Behind
  // the last token the gradient is zero and so is the share.
  void divide(const Real* z, int64_t count, const Tile& t) const {
    const Vec<Real> eps = splat(static_cast<Real>(p_.eps)), zero{};
    for (int64_t n = 0; n < count; n += kW) {
      const Real *query = column<Op>(t.activated, n), *through = column<Op>(t.through, n);
      Vec<Real> total{}, product{};
      for (int64_t c = 0; c < channels_; ++c) {
        const Vec<Real> q = load(query + c * kPanel<Op>);
        total += z[c] * q;
        product += load(through + c * kPanel<Op>) * q;
      }
      const Vec<Real> weight = Real(1) / at_least(eps, total);
      store(t.weight + n, weight);
      store(t.share + n, total >= eps ? product * weight * weight : zero);
    }
  }

  // The gradient of k^ to t.total, with values in t.value.
  void key_gradient(const Piece& piece, int64_t pair, int64_t count, const Tile& t) const {
    const int64_t state = pair * p_.batch + piece.row;
    layers(pair, count, t);
    Base::project_first(first_[2 * pair + 1], 2 * pair + 1, count, t, t.value);
    Base::project(Base::matrix(p_.state_s, state), Base::vector(p_.state_z, state), t.value, count, t.total);
    for (int64_t c = 0; c < channels_; ++c) Base::fill_padding(t.total, c, count, Real(0));
  }

  // Calls body(da, y, place) for the vectors of row c, da being total times the slope. The slope of queries is
  // in t.slope; that of keys is computed here, and their values with it where asked.
  template <Slope kSlope, class Body>
  void for_gradient(int64_t pair, int64_t c, int64_t count, const Tile& t, const Body& body) const {
    const Real* affine = Base::vector(p_.affine, 3 * pair) + c;
    const Real bias = affine[0], scale = affine[channels_], beta = affine[2 * channels_];
    Base::for_row(t.total, c, count, [&](int64_t i, int64_t) {
      const Vec<Real> y = load(t.second.data + i) + bias;
      Vec<Real> slope;
      if constexpr (kSlope == Slope::kStored) {
        slope = load(t.slope.data + i);
      } else if constexpr (kSlope == Slope::kAlone) {
        slope = softplus_derivative(scale * y + beta);
      } else {
        Vec<Real> value;
        softplus_with_derivative(scale * y + beta, value, slope);
        store(t.activated.data + i, value);
      }
      body(load(t.total.data + i) * slope, y, i);
    });
  }

  // Sums of da and of da y.
  template <Slope kSlope>
  void add_sums(int64_t pair, int64_t count, const Tile& t, Real* sums) const {
    for (int64_t c = 0; c < channels_; ++c) {
      Vec<Real> first{}, second{};
      for_gradient<kSlope>(pair, c, count, t, [&](Vec<Real> gradient, Vec<Real> y, int64_t) {
        first += gradient;
        second += gradient * y;
      });
      sums[c] += sum_lanes<Real>(first);
      sums[channels_ + c] += sum_lanes<Real>(second);
    }
  }
  // total = D da - c0 - c1 y; zero behind the last token.
  template <Slope kSlope>
  void normalise(int64_t pair, int64_t count, const Tile& t) const {
    const Real* scale = Base::vector(p_.affine, 3 * pair + 1);
    const Real* coefficients = Base::vector(p_.coefficients, 2 * pair);
    for (int64_t c = 0; c < channels_; ++c) {
      const Real factor = scale[c], constant = coefficients[c], slope = coefficients[channels_ + c];
      for_gradient<kSlope>(pair, c, count, t, [&](Vec<Real> gradient, Vec<Real> y, int64_t i) {
        store(t.total.data + i, factor * gradient - constant - slope * y);
      });
      Base::fill_padding(t.total, c, count, Real(0));
    }
  }

  // The gradients of both layers; body gives that of the second layer in t.total.
  template <class Body>
  void layer_gradients(const TrainingResults& results, const Body& body) const {
    const int64_t C = channels_, size = C * row_;
    const Partials<Real> partials = Base::template pair_partials<Real>(size + C);
    const Partials<double> products = Base::template pair_partials<double>(size);
    for_gradient_tiles([&](const Piece& piece, int64_t pair, bool first, int64_t n, int64_t count, const Tile& t) {
      if (n == piece.begin) {
        partials.cleared(pair, piece);
        products.cleared(pair, piece);
      }
      Real* partial = partials.at(pair, piece.row, piece.part);
      body(piece, pair, n, count, t);
      transpose_to_rows<Op>(constant(t.hidden), C, count, t.rows);
      Base::add_outer(t.total, t.rows, count, partial);
      Base::project(Base::matrix(p_.second, pair), nullptr, t.total, count, t.through);
      mask(t.hidden, t.through, count, partial + size);
      Base::add_outer_of_input(pair, t.through, count, t, products.at(pair, piece.row, piece.part));
      add_to_input(layers_ * pair, first, piece, count, t);
    });
    sum_pairs(partials, 0, C, row_, results.second);
    sum_pairs(products, 0, C, row_, results.first);
    sum_pairs(partials, size, 1, C, results.bias);
  }
  // gradient = 0 where value is not positive; adds its sums over tokens.
  void mask(Matrix value, Matrix gradient, int64_t count, Real* sums) const {
    for (int64_t c = 0; c < channels_; ++c) {
      Base::fill_padding(gradient, c, count, Real(0));
      sums[c] += Base::row_sum(gradient, c, count, [&](int64_t i, int64_t) {
        const Vec<Real> kept = load(value.data + i) > 0 ? load(gradient.data + i) : Vec<Real>{};
        store(gradient.data + i, kept);
        return kept;
      });
    }
  }
  // t.grad_x = or += W^T diag(D) t.through for first layer number `layer`.
  void add_to_input(int64_t layer, bool first, const Piece& piece, int64_t count, const Tile& t) const {
    if (!wanted(piece)) return;
    const auto weight = Base::matrix(scaled_.data(), layer);
    if (first) return Base::project(weight, nullptr, t.through, count, t.grad_x);
    Base::add_projection(weight, t.through, count, t.grad_x);
  }

  template <class T>
  void sum_pairs(const Partials<T>& partials, int64_t from, int64_t rows, int64_t row, void* to) const {
    parallel_for(p_.pairs.size(), threads_, [&](int64_t pair, int) {
      partials.sum(partials.at(pair, 0, 0), partials.pieces(pair), from, rows, channels_, row,
                   static_cast<T*>(to) + pair * rows * channels_);
    });
  }

  int64_t layers_;
  Transposed<Op> first_, second_;
  Scratch scaled_;  // diag(D) W of the first layers
};

template <class Op>
class InputGradient : Training<Op> {
  using Base = Training<Op>;
  using typename Base::Tile;

 public:
  InputGradient(const TrainingProblem& problem, int threads) : Base(problem, true, threads) {}

  // `first` and `first_affine` are the matrix and the vector of every slot.
  void run() const {
    const TrainingProblem& p = Base::p_;
    const Transposed<Op> matrix(p.first, p.features.size, p.channels, Base::threads_);
    Base::for_pieces(false, [&](const Piece& piece, int64_t, int64_t, const Tile& t) {
      if (!p.grad_features[piece.slot].data) return;
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, t);
        Base::project(matrix[piece.slot], Base::vector(p.first_affine, piece.slot), t.x, count, t.grad_x);
        Base::add_gradient(piece, n, count, t);
      });
    });
  }
};

}  // namespace

void training_target_sums(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Backward<decltype(op)>(problem, 1, threads).target_sums(results); });
}

void training_target_gradients(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Backward<decltype(op)>(problem, 1, threads).target_gradients(results); });
}

void training_source_sums(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Backward<decltype(op)>(problem, 2, threads).source_sums(results); });
}

void training_source_gradients(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Backward<decltype(op)>(problem, 2, threads).source_gradients(results); });
}

void training_input_gradient(const TrainingProblem& problem, const TrainingResults&, int threads) {
  with_real(problem.dtype, [&](auto op) { InputGradient<decltype(op)>(problem, threads).run(); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
