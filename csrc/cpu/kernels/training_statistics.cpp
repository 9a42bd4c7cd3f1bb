// Moments of features and of hidden layers for the cross-attention block in training.
//
// Tiles are centred by their own means and merged by Chan's formula. Means are kept in double; the one that
// a tile was centred by is rounded, so the mean of what is left corrects it.
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
    const auto itself = [](int64_t slot) { return slot; };
    const Partials<double> means(pieces_, p_.batch, p_.features.size, channels_, itself);
    const Partials<Real> deviations(pieces_, p_.batch, p_.features.size, channels_ * row_, itself);
    Base::for_pieces(false, [&](const Piece& piece, int64_t, int64_t, const Tile& t) {
      double* mean = means.cleared(piece.slot, piece);
      Real* deviation = deviations.cleared(piece.slot, piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_panels(p_.features[piece.slot], piece.row, n, count, t.x, t.x_rows);
        add_tile(t, static_cast<double>(n - piece.begin), count, mean, deviation);
      });
    });
    parallel_for(p_.features.size, threads_, [&](int64_t slot, int) {
      merge(
          slot, slot, means, results.mean,
          [&](int64_t i, int64_t part, double count, const double* apart, double* sums) {
            const Real* deviation = deviations.at(slot, 0, 0) + part * deviations.size() + i * row_;
            for (int64_t c = 0; c < channels_; ++c)
              sums[c] += static_cast<double>(deviation[c]) + count * apart[i] * apart[c];
          },
          channels_, results.deviations);
    });
  }

  // Of second-layer products without their bias: first, second and first_bias of the problem.
  void hidden_moments(const TrainingResults& results) const {
    const Transposed<Op> first(p_.first, p_.pairs.size(), channels_, threads_);
    const Transposed<Op> second(p_.second, p_.pairs.size(), channels_, threads_);
    const auto slot_of = [&](int64_t pair) { return p_.pairs.group[pair]; };
    const Partials<double> moments(pieces_, p_.batch, p_.pairs.size(), 2 * channels_, slot_of);
    Base::for_pieces(true, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      for (int64_t i = begin; i < end; ++i) moments.cleared(p_.pairs.members[i], piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, false, t);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = p_.pairs.members[i];
          Base::project(first[pair], Base::vector(p_.first_bias, pair), true, t.x, count, t.hidden);
          Base::project(second[pair], nullptr, false, t.hidden, count, t.normalised);
          double* mean = moments.at(pair, piece.row, piece.part);
          add_tile(t, static_cast<double>(n - piece.begin), count, mean);
        }
      });
    });
    parallel_for(p_.pairs.size(), threads_, [&](int64_t pair, int) {
      merge(
          slot_of(pair), pair, moments, results.mean,
          [&](int64_t, int64_t part, double count, const double* apart, double* sums) {
            const double* deviation = moments.at(pair, 0, 0) + part * moments.size() + channels_;
            for (int64_t c = 0; c < channels_; ++c) sums[c] += deviation[c] + count * apart[c] * apart[c];
          },
          1, results.deviations);
    });
  }

 private:
  // The mean of row c of a matrix, which is made its deviations from the mean in the type of the matrix.
  double centre_row(Panels<Real> x, int64_t c, int64_t count) const {
    Base::fill_padding(x, c, count, Real(0));
    const Real sum = Base::row_sum(x, c, count, [&](int64_t i, int64_t) { return load(x.data + i); });
    const Real mean = sum / static_cast<Real>(count);
    Base::fill_padding(x, c, count, mean);
    const Real rest = Base::row_sum(x, c, count, [&](int64_t i, int64_t) {
      const Vec<Real> left = load(x.data + i) - mean;
      store(x.data + i, left);
      return left;
    });
    return static_cast<double>(mean) + static_cast<double>(rest) / static_cast<double>(count);
  }

  // Merges a tile of features into the moments of the tokens before it.
  void add_tile(const Tile& t, double before, int64_t count, double* mean, Real* deviation) const {
    const double share = static_cast<double>(count) / (before + static_cast<double>(count));
    // The tile's distances from the mean so far, and the same times a weight, in the rows' type.
    Real *apart = t.weight, *weighted = t.share;
    for (int64_t c = 0; c < channels_; ++c) {
      const double difference = centre_row(t.x, c, count) - mean[c];
      mean[c] += share * difference;
      apart[c] = static_cast<Real>(difference);
      weighted[c] = static_cast<Real>(difference * share * before);
    }
    transpose_to_rows<Op>(constant(t.x), channels_, count, t.x_rows);
    Base::add_outer(t.x, t.x_rows, count, deviation);
    for (int64_t i = 0; before > 0 && i < channels_; ++i)
      for (int64_t c = 0; c < channels_; ++c) deviation[i * row_ + c] += weighted[i] * apart[c];
  }
  // The same for each channel of a second layer by itself.
  void add_tile(const Tile& t, double before, int64_t count, double* mean) const {
    const double share = static_cast<double>(count) / (before + static_cast<double>(count));
    for (int64_t c = 0; c < channels_; ++c) {
      const double difference = centre_row(t.normalised, c, count) - mean[c];
      const Real squares = Base::row_sum(t.normalised, c, count, [&](int64_t i, int64_t) {
        const Vec<Real> x = load(t.normalised.data + i);
        return x * x;
      });
      mean[c] += share * difference;
      mean[channels_ + c] += static_cast<double>(squares) + difference * difference * share * before;
    }
  }

  // The mean over all pieces, and rows of deviations: body(row, piece, its tokens, the distances of its mean
  // from that of all, sums) adds what a piece has.
  template <class Body>
  void merge(int64_t slot, int64_t member, const Partials<double>& moments, void* means, const Body& body, int64_t rows,
             void* deviations) const {
    const int64_t C = channels_, number = moments.pieces(member), parts = moments.parts(member);
    Scratch memory(sizeof(double) * static_cast<size_t>(C * (number + 2)));
    double *mean = reinterpret_cast<double*>(memory.data()), *sums = mean + C, *apart = sums + C;
    const auto count = [&](int64_t i) {
      return static_cast<double>(pieces_[pieces_.number(slot, i / parts, i % parts)].count);
    };
    const double tokens = static_cast<double>(p_.batch * p_.features[slot].tokens);
    for (int64_t c = 0; c < C; ++c) {
      mean[c] = 0;
      for (int64_t i = 0; i < number; ++i) mean[c] += count(i) / tokens * piece_moments(moments, member, i)[c];
      for (int64_t i = 0; i < number; ++i) apart[i * C + c] = piece_moments(moments, member, i)[c] - mean[c];
      static_cast<Real*>(means)[member * C + c] = static_cast<Real>(mean[c]);
    }
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(sums, 0, sizeof(double) * static_cast<size_t>(C));
      for (int64_t i = 0; i < number; ++i) body(r, i, count(i), apart + i * C, sums);
      Real* to = static_cast<Real*>(deviations) + (member * rows + r) * C;
      for (int64_t c = 0; c < C; ++c) to[c] = static_cast<Real>(sums[c]);
    }
  }
  static const double* piece_moments(const Partials<double>& moments, int64_t member, int64_t i) {
    return moments.at(member, 0, 0) + i * moments.size();
  }
};

}  // namespace

void training_moments(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Statistics<decltype(op)>(problem, true, threads).moments(results); });
}

void training_hidden_moments(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Statistics<decltype(op)>(problem, false, threads).hidden_moments(results); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
