// Forward passes of the cross-attention block in training: states of sources, then outputs of targets.
#include "../training.h"
#include "table.h"

namespace xattn {
namespace XATTN_ISA {
namespace {

template <class Op>
class Forward : Training<Op> {
  using Base = Training<Op>;
  using Base::channels_;
  using Base::p_;
  using Base::pieces_;
  using Base::row_;
  using Base::threads_;
  using typename Base::Real;
  using typename Base::Tile;

 public:
  Forward(const TrainingProblem& problem, int threads) : Base(problem, false, threads) {}

  void states(const TrainingResults& results) const {
    const int64_t C = channels_, pairs = p_.pairs.size();
    const Transposed<Op> first(p_.first, 2 * pairs, C, threads_), second(p_.second, pairs, C, threads_);
    const Partials<Real> partials = Base::template pair_partials<Real>(C * row_ + C);
    Base::for_pieces(true, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      for (int64_t i = begin; i < end; ++i) partials.cleared(p_.pairs.members[i], piece);
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, t);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = p_.pairs.members[i];
          Base::project_first(first[2 * pair], 2 * pair, count, t, t.hidden);
          Base::project(second[pair], nullptr, t.hidden, count, t.second);
          Base::template activate<false>(pair, count, t);
          Base::project_first(first[2 * pair + 1], 2 * pair + 1, count, t, t.value);
          Real* state = partials.at(pair, piece.row, piece.part);
          for (int64_t c = 0; c < C; ++c) {
            Base::fill_padding(t.activated, c, count, Real(0));
            state[C * row_ + c] +=
                Base::row_sum(t.activated, c, count, [&](int64_t at, int64_t) { return load(t.activated.data + at); });
          }
          transpose_to_rows<Op>(constant(t.activated), C, count, t.rows);
          Base::add_outer(t.value, t.rows, count, state);
        }
      });
    });
    parallel_for(pairs * p_.batch, threads_, [&](int64_t index, int) {
      const int64_t pair = index / p_.batch;
      const Real* data = partials.at(pair, index % p_.batch, 0);
      const int64_t parts = partials.parts(pair);
      partials.sum(data, parts, 0, C, C, row_, static_cast<Real*>(results.state_s) + index * C * C);
      partials.sum(data, parts, C * row_, 1, C, C, static_cast<Real*>(results.state_z) + index * C);
    });
  }

  void attend() const {
    const int64_t C = channels_, pairs = p_.pairs.size();
    const Transposed<Op> first(p_.first, pairs, C, threads_), second(p_.second, pairs, C, threads_);
    const Transposed<Op> states(p_.state_s, p_.outputs.size() * p_.batch, C, threads_);
    Base::for_pieces(true, [&](const Piece& piece, int64_t begin, int64_t end, const Tile& t) {
      Base::for_tiles(piece, [&](int64_t n, int64_t count) {
        Base::load_centred(piece, n, count, t);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t pair = p_.pairs.members[i];
          Base::project_first(first[pair], pair, count, t, t.hidden);
          Base::project(second[pair], nullptr, t.hidden, count, t.second);
          Base::template activate<false>(pair, count, t);
          for (int64_t j = p_.outputs.begin[pair]; j < p_.outputs.begin[pair + 1]; ++j) {
            const int64_t o = p_.outputs.members[j], state = o * p_.batch + piece.row;
            Base::project(states[state], nullptr, t.activated, count, t.value);
            divisors(Base::vector(p_.state_z, state), count, t);
            store_channels<Op>(constant(t.value), t.weight, 0, C, count, p_.dtype, p_.maps[o], piece.row, n);
          }
        }
      });
    });
  }

 private:
  // t.weight = 1 / max(z . q^, eps)
  void divisors(const Real* z, int64_t count, const Tile& t) const {
    const Vec<Real> eps = splat(static_cast<Real>(p_.eps));
    for (int64_t n = 0; n < count; n += Base::kW) {
      const Real* from = column<Op>(t.activated, n);
      Vec<Real> sum{};
      for (int64_t c = 0; c < channels_; ++c) sum += z[c] * load(from + c * t.activated.row);
      store(t.weight + n, Real(1) / at_least(eps, sum));
    }
  }
};

}  // namespace

void training_states(const TrainingProblem& problem, const TrainingResults& results, int threads) {
  with_real(problem.dtype, [&](auto op) { Forward<decltype(op)>(problem, threads).states(results); });
}

void training_attend(const TrainingProblem& problem, const TrainingResults&, int threads) {
  with_real(problem.dtype, [&](auto op) { Forward<decltype(op)>(problem, threads).attend(); });
}

}  // namespace XATTN_ISA
}  // namespace xattn
