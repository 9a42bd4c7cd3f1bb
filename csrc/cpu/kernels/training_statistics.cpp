// Moments of features and of layers for the cross-attention block in training.
//
// Those of features are computed in double, about rounded means: in the variances of first layers nearly all
// of their terms may cancel. Those of layers are of the products that all other passes compute again: tiles
// are centred by their own means and merged by Chan's formula. Means are kept in double; the one that a tile
// was centred by is rounded, so the mean of what is left corrects it.
#include "../training.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

template <class Op>
class Statistics : Training<Op> {
  using Base = Training<Op>;
  using Base::channels_;
  using Base::p_;
  using Base::pieces_;
  using Base::row_;
  using Base::threads_;
  using typename Base::Real;
  using typename Base::Tile;

 public:
  Statistics(const TrainingProblem& problem, bool all_slots, int threads) : Base(problem, all_slots, threads) {}

  void moments(const TrainingResults& results) const {
    const int64_t C = channels_, slots = p_.features.size;
    const auto itself = [](int64_t slot) { return slot; };
    const Partials<double> sums(pieces_, p_.batch, slots, C, itself);
    Base::for_pieces(false, [&](const Piece& piece, int64_t, int64_t, const Tile& t) {
      double* sum = sums.cleared(piece.slot, piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_panels(p_.features[piece.slot], piece.row, n, count, t.x, t.x_rows);
        for (int64_t c = 0; c < C; ++c) sum[c] += row_sum(t.x, c, count);
      });
    });
    Scratch memory(sizeof(Real) * static_cast<size_t>(slots * C));
    Real* centers = reinterpret_cast<Real*>(memory.data());
    double *means = static_cast<double*>(results.mean), *deviations = static_cast<double*>(results.deviations);
    for (int64_t slot = 0; slot < slots; ++slot) {
      sums.sum(sums.at(slot, 0, 0), sums.pieces(slot), 0, 1, C, C, means + slot * C);
      for (int64_t c = 0; c < C; ++c) centers[slot * C + c] = static_cast<Real>(means[slot * C + c] / tokens(slot));
    }
    const Partials<double> products(pieces_, p_.batch, slots, C * row_ + C, itself);
    Base::for_pieces(false, [&](const Piece& piece, int64_t, int64_t, const Tile& t) {
      double* product = products.cleared(piece.slot, piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_panels(p_.features[piece.slot], piece.row, n, count, t.x, t.x_rows);
        Base::rows_in_double(centers + piece.slot * C, count, t);
        const Panels<double> x = Base::rows_of(t.right);
        multiply<Float64, Output::kAccumulate>({C, C, count, constant(x), constant(x)}, Base::rows_of(product));
        for (int64_t i = 0; i < count; ++i)
          for (int64_t c = 0; c < C; ++c) product[C * row_ + c] += t.right[i * row_ + c];
      });
    });
    parallel_for(slots, threads_, [&](int64_t slot, int) {
      double *mean = means + slot * C, *deviation = deviations + slot * C * C;
      const double* parts = products.at(slot, 0, 0);
      products.sum(parts, products.pieces(slot), 0, C, C, row_, deviation);
      products.sum(parts, products.pieces(slot), C * row_, 1, C, C, mean);
      for (int64_t i = 0; i < C; ++i)
        for (int64_t c = 0; c < C; ++c) deviation[i * C + c] -= mean[i] * mean[c] / tokens(slot);
      for (int64_t c = 0; c < C; ++c) mean[c] = static_cast<double>(centers[slot * C + c]) + mean[c] / tokens(slot);
    });
  }

  // Of first-layer products, of the pairs that ask for it; zero for others.
  void first_moments(const TrainingResults& results) const {
    const Transposed<Op> first(p_.first, p_.pairs.size(), channels_, threads_);
    layer_moments(
        results, [&](int64_t pair) { return Base::precise(pair); },
        [&](int64_t pair, int64_t count, const Tile& t) { Base::project(first[pair], nullptr, t.x, count, t.second); });
  }

  // Of second-layer products: first, first_affine and second of the problem.
  void hidden_moments(const TrainingResults& results) const {
    const Transposed<Op> first(p_.first, p_.pairs.size(), channels_, threads_);
    const Transposed<Op> second(p_.second, p_.pairs.size(), channels_, threads_);
    layer_moments(
        results, [](int64_t) { return true; },
        [&](int64_t pair, int64_t count, const Tile& t) {
          Base::project_first(first[pair], pair, count, t, t.hidden);
          Base::project(second[pair], nullptr, t.hidden, count, t.second);
        });
  }

 private:
  double tokens(int64_t slot) const { return static_cast<double>(max64(p_.batch * p_.features[slot].tokens, 1)); }

  double row_sum(Panels<Real> x, int64_t c, int64_t count) const {
    Base::fill_padding(x, c, count, Real(0));
    return static_cast<double>(Base::row_sum(x, c, count, [&](int64_t i, int64_t) { return load(x.data + i); }));
  }

  // The mean of row c of a matrix, which is made its deviations from the mean in the type of the matrix.
  double centre_row(Panels<Real> x, int64_t c, int64_t count) const {
    const Real mean = static_cast<Real>(row_sum(x, c, count) / static_cast<double>(count));
    Base::fill_padding(x, c, count, mean);
    const Real rest = Base::row_sum(x, c, count, [&](int64_t i, int64_t) {
      const Vec<Real> left = load(x.data + i) - mean;
      store(x.data + i, left);
      return left;
    });
    return static_cast<double>(mean) + static_cast<double>(rest) / static_cast<double>(count);
  }

  // Means and squared deviations of what `compute` leaves in t.second, of the pairs that are wanted.
  template <class Wanted, class Compute>
  void layer_moments(const TrainingResults& results, const Wanted& wanted, const Compute& compute) const {
    const Partials<double> moments = Base::template pair_partials<double>(2 * channels_);
    Base::for_pieces(true, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      for (int64_t i = begin; i < end; ++i) moments.cleared(p_.pairs.members[i], piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, t);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = p_.pairs.members[i];
          if (!wanted(pair)) continue;
          compute(pair, count, t);
          add_tile(t, static_cast<double>(n - piece.begin), count, moments.at(pair, piece.row, piece.part));
        }
      });
    });
    parallel_for(p_.pairs.size(), threads_, [&](int64_t pair, int) {
      double* mean = static_cast<double*>(results.mean) + pair * channels_;
      merge(pair, moments, mean, static_cast<double*>(results.deviations) + pair * channels_);
    });
  }

  // Merges a tile into the moments of the tokens before it.
  void add_tile(const Tile& t, double before, int64_t count, double* mean) const {
    const double share = static_cast<double>(count) / (before + static_cast<double>(count));
    for (int64_t c = 0; c < channels_; ++c) {
      const double difference = centre_row(t.second, c, count) - mean[c];
      const Real squares = Base::row_sum(t.second, c, count, [&](int64_t i, int64_t) {
        const Vec<Real> x = load(t.second.data + i);
        return x * x;
      });
      mean[c] += share * difference;
      mean[channels_ + c] += static_cast<double>(squares) + difference * difference * share * before;
    }
  }

  // The moments of a pair over all of its pieces.
  void merge(int64_t pair, const Partials<double>& moments, double* mean, double* deviations) const {
    const int64_t slot = p_.pairs.group[pair], number = moments.pieces(pair), parts = moments.parts(pair);
    const auto count = [&](int64_t i) {
      return static_cast<double>(pieces_[pieces_.number(slot, i / parts, i % parts)].count);
    };
    const auto piece = [&](int64_t i) { return moments.at(pair, 0, 0) + i * moments.size(); };
    for (int64_t c = 0; c < channels_; ++c) {
      mean[c] = deviations[c] = 0;
      for (int64_t i = 0; i < number; ++i) mean[c] += count(i) / tokens(slot) * piece(i)[c];
      for (int64_t i = 0; i < number; ++i) {
        const double apart = piece(i)[c] - mean[c];
        deviations[c] += piece(i)[channels_ + c] + count(i) * apart * apart;
      }
    }
  }
};

}  // namespace

void training_moments(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Statistics<decltype(op)>(problem, true, threads).moments(results); });
}

void training_first_moments(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Statistics<decltype(op)>(problem, false, threads).first_moments(results); });
}

void training_hidden_moments(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Statistics<decltype(op)>(problem, false, threads).hidden_moments(results); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
