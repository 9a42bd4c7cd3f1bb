// What the passes of the cross-attention block in training share: tiles, their products, and sums over
// pieces of the tokens.
//
// A pass cuts every slot into pieces of tokens, whose lengths depend on shapes alone. The tiles of a piece
// are loaded once for all pairs of the slot; what a pair sums over tokens is added up by piece, and pieces
// are added in their order, so that results do not depend on the number of threads.
//
// Matrix layouts: channels are rows and tokens lie along the vectors, in panels, which makes the output of
// a product an operand of the next. A product that sums over tokens broadcasts such a matrix and takes its
// other factor with tokens as rows.
//
// Layers are computed as they are without kernels, a product and then a scale and a shift: their statistics
// are those of the very same products, and what their gradients must sum to zero over all tokens does.
#pragma once

#include "math.h"
#include "pieces.h"
#include "transpose.h"

namespace xattn {
namespace XATTN_ISA {

constexpr int64_t kTrainingTileBytes = 48 * 1024;  // of one matrix of a tile
constexpr int64_t kTrainingPieces = 64;            // about how many all slots together are cut into
constexpr int64_t kTrainingTasks = 32;             // below this many, pairs of a slot may become tasks of their own

// Transposes of C x C matrices, with padded rows.
template <class Op>
class Transposed {
 public:
  using Real = typename Op::Real;
  Transposed(const void* from, int64_t count, int64_t channels, int threads)
      : channels_(channels),
        size_(channels * row_length<Op>(channels)),
        memory_(sizeof(Real) * static_cast<size_t>(count * size_ + kLanes<Real>)),
        data_(reinterpret_cast<Real*>(memory_.data())) {
    parallel_for(count, threads, [&](int64_t index, int) {
      transpose(static_cast<const Real*>(from) + index * channels * channels,
                row_major<Op>(data_ + index * size_, channels));
    });
  }
  Panels<const Real> operator[](int64_t i) const { return constant(row_major<Op>(data_ + i * size_, channels_)); }

 private:
  void transpose(const Real* from, Panels<Real> to) const {
    constexpr int64_t kW = kLanes<Real>;
    const int64_t C = channels_;
    for (int64_t i = 0; i < C; i += kW) {
      for (int64_t j = 0; j < to.row; j += kW) {
        if (max64(i, j) + kW <= C) {
          transpose_square(from + j * C + i, C, kW, to.data + i * to.row + j, to.row, kW);
          continue;
        }
        for (int64_t r = i; r < min64(i + kW, C); ++r)
          for (int64_t c = j; c < j + kW; ++c) to.data[r * to.row + c] = c < C ? from[c * C + r] : Real(0);
      }
    }
  }

  int64_t channels_, size_;
  Scratch memory_;
  Real* data_;
};

// `size` numbers of every member of a group of slots, for every piece of its slot.
template <class T>
class Partials {
 public:
  template <class SlotOf>
  Partials(const Pieces& pieces, int64_t batch, int64_t members, int64_t size, const SlotOf& slot_of)
      : batch_(batch),
        size_(round_up(size, 64 / int64_t(sizeof(T)))),
        index_(sizeof(int64_t) * static_cast<size_t>(2 * members + 1)),
        first_(reinterpret_cast<int64_t*>(index_.data())),
        parts_(first_ + members + 1),
        memory_(sizeof(T) * static_cast<size_t>(number(pieces, members, slot_of) * size_)) {}

  T* at(int64_t member, int64_t b, int64_t part) const {
    return reinterpret_cast<T*>(memory_.data()) + (first_[member] + b * parts_[member] + part) * size_;
  }
  T* cleared(int64_t member, const Piece& piece) const {
    T* data = at(member, piece.row, piece.part);
    std::memset(data, 0, sizeof(T) * static_cast<size_t>(size_));
    return data;
  }
  int64_t size() const { return size_; }
  int64_t parts(int64_t member) const { return parts_[member]; }
  int64_t pieces(int64_t member) const { return batch_ * parts_[member]; }

  // Rows of numbers `from` their place, summed over `pieces` pieces from the first one at `data`.
  void sum(const T* data, int64_t pieces, int64_t from, int64_t rows, int64_t columns, int64_t row, void* to) const {
    T* sums = static_cast<T*>(to);
    std::memset(sums, 0, sizeof(T) * static_cast<size_t>(rows * columns));
    for (int64_t i = 0; i < pieces; ++i)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < columns; ++c) sums[r * columns + c] += data[i * size_ + from + r * row + c];
  }

 private:
  template <class SlotOf>
  int64_t number(const Pieces& pieces, int64_t members, const SlotOf& slot_of) {
    first_[0] = 0;
    for (int64_t i = 0; i < members; ++i) {
      parts_[i] = pieces.parts(slot_of(i));
      first_[i + 1] = first_[i] + batch_ * parts_[i];
    }
    return first_[members];
  }

  int64_t batch_, size_;
  Scratch index_;
  int64_t *first_, *parts_;
  Scratch memory_;
};

template <class Op>
class Training {
 public:
  using Real = typename Op::Real;
  using Matrix = Panels<Real>;
  using Constant = Panels<const Real>;
  static constexpr int64_t kW = kLanes<Real>;

 protected:
  // Matrices of one tile; a pass touches those that it needs.
  struct Tile {
    Matrix x, hidden, second, activated, slope, value, gradient, through, total, grad_x;
    Matrix x_rows, map_rows, rows;  // tokens as rows
    Real *weight, *share;           // of tokens, or of channels
    Real* product;                  // C x C
    double *left, *right;           // a matrix of panels and one of rows, element by element
    Tile(Arena& arena, int64_t tokens, int64_t channels) {
      Matrix* const panels[] = {&x, &hidden, &second, &activated, &slope, &value, &gradient, &through, &total, &grad_x};
      Matrix* const plain[] = {&x_rows, &map_rows, &rows};
      for (Matrix* matrix : panels) *matrix = panelled<Op>(arena.take<Real>(tokens * channels), channels);
      for (Matrix* matrix : plain)
        *matrix = row_major<Op>(arena.take<Real>(tokens * row_length<Op>(channels)), channels);
      weight = arena.take<Real>(max64(tokens, channels));
      share = arena.take<Real>(max64(tokens, channels));
      product = arena.take<Real>(channels * row_length<Op>(channels));
      left = arena.take<double>(tokens * channels);
      right = arena.take<double>(tokens * row_length<Op>(channels));
    }
  };

  Training(const TrainingProblem& problem, bool all_slots, int threads)
      : p_(problem),
        threads_(threads),
        channels_(problem.channels),
        row_(row_length<Op>(problem.channels)),
        tile_(tile_tokens<Op>(problem.channels, kTrainingTileBytes)),
        tile_bytes_(round_up(static_cast<int64_t>(bytes_of<Tile>(tile_, problem.channels)), 64)),
        tiles_(static_cast<size_t>(tile_bytes_ * max64(threads, 1))),
        pieces_(
            problem.features, problem.batch, [step = piece_tokens(problem)](int64_t) { return step; },
            [&](int64_t slot) { return all_slots || problem.pairs.of(slot) > 0; }) {}

  static int64_t piece_tokens(const TrainingProblem& p) {
    int64_t tokens = 0;
    for (int64_t s = 0; s < p.features.size; ++s) tokens += p.batch * p.features[s].tokens;
    return round_up(max64(max64(1024, 16 * p.channels), ceil_div(tokens, kTrainingPieces)), kPanel<Op>);
  }

  template <class T>
  Partials<T> pair_partials(int64_t size) const {
    return {pieces_, p_.batch, p_.pairs.size(), size, [&](int64_t pair) { return p_.pairs.group[pair]; }};
  }

  // Calls body for every piece with the range of pairs, in the order of slots, that it is to do.
  template <class Body>
  void for_pieces(bool pairs_apart, const Body& body) const {
    int64_t most = 1;
    if (pairs_apart && pieces_.total() < kTrainingTasks)
      for (int64_t slot = 0; slot < p_.features.size; ++slot) most = max64(most, p_.pairs.of(slot));
    parallel_for(pieces_.total() * most, threads_, [&](int64_t index, int worker) {
      const Piece piece = pieces_[index / most];
      const int64_t first = p_.pairs.begin[piece.slot], last = p_.pairs.begin[piece.slot + 1];
      Arena arena(tiles_.data() + worker * tile_bytes_);
      const Tile t(arena, tile_, channels_);
      if (most == 1) {
        body(piece, first, last, t);
      } else if (first + index % most < last) {
        body(piece, first + index % most, first + index % most + 1, t);
      }
    });
  }
  template <class Body>
  void for_tiles(const Piece& piece, const Body& body) const {
    const int64_t step = even_tile<Op>(piece.count, tile_), end = piece.begin + piece.count;
    for (int64_t n = piece.begin; n < end; n += step) body(n, min64(step, end - n));
  }

  // A contiguous matrix as the broadcast factor of a product over its rows.
  Constant matrix(const void* matrices, int64_t i) const {
    return {static_cast<const Real*>(matrices) + i * channels_ * channels_, channels_, kPanel<Op>};
  }
  const Real* vector(const void* vectors, int64_t i) const { return static_cast<const Real*>(vectors) + i * channels_; }

  // Calls body(place in a matrix, token) for every vector of row c.
  template <class Body>
  static void for_row(Matrix matrix, int64_t c, int64_t count, const Body& body) {
    for (int64_t n = 0; n < count; n += kPanel<Op>) {
      const int64_t place = n / kPanel<Op> * matrix.panel + c * matrix.row;
      if (count - n > 2 * kW) {
        body(place, n);
        body(place + kW, n + kW);
        body(place + 2 * kW, n + 2 * kW);
      } else {
        body(place, n);
        if (count - n > kW) body(place + kW, n + kW);
      }
    }
  }

  void fill_padding(Matrix matrix, int64_t c, int64_t count, Real value) const {
    for (int64_t n = count; n < round_up(count, kW); ++n) column<Op>(matrix, n)[c * matrix.row] = value;
  }

  // Tokens of a view as panels; `rows` is room for where the view's channels lie together.
  void load_panels(const View& view, int64_t b, int64_t n, int64_t count, Matrix to, Matrix rows) const {
    if (view.channel_stride != 1) return load_channels<Op>(p_.dtype, view, b, n, count, 0, channels_, to);
    load_tokens<Op>(p_.dtype, view, b, n, count, 0, channels_, rows);
    transpose_to_panels<Op>(constant(rows), channels_, count, to);
  }
  // x' as panels.
  void load_centred(const Piece& piece, int64_t n, int64_t count, const Tile& t) const {
    load_panels(p_.features[piece.slot], piece.row, n, count, t.x, t.x_rows);
    centre(vector(p_.center, piece.slot), count, t);
  }
  // x' as rows as well and, where asked, these in double, in which the difference is exact.
  void load_centred_rows(const Piece& piece, int64_t n, int64_t count, bool in_double, const Tile& t) const {
    const Real* center = vector(p_.center, piece.slot);
    load_panels(p_.features[piece.slot], piece.row, n, count, t.x, t.x_rows);
    if (in_double) rows_in_double(center, count, t);
    centre(center, count, t);
    transpose_to_rows<Op>(constant(t.x), channels_, count, t.x_rows);
  }
  void centre(const Real* center, int64_t count, const Tile& t) const {
    for (int64_t c = 0; c < channels_; ++c) {
      const Vec<Real> middle = splat(center[c]);
      for_row(t.x, c, count, [&](int64_t i, int64_t) { store(t.x.data + i, load(t.x.data + i) - middle); });
    }
  }
  // From features as panels to their distances from the center as rows, in t.right.
  void rows_in_double(const Real* center, int64_t count, const Tile& t) const {
    transpose_to_rows<Op>(constant(t.x), channels_, count, t.x_rows);
    for (int64_t n = 0; n < count; ++n) {
      const Real* from = t.x_rows.data + n * row_;
      double* to = t.right + n * row_;
      for (int64_t c = 0; c < channels_; ++c) to[c] = static_cast<double>(from[c]) - static_cast<double>(center[c]);
      for (int64_t c = channels_; c < row_; ++c) to[c] = 0;
    }
  }

  // to = weight from + bias, the weight being transposed: a row for each of its columns.
  void project(Constant weight, const Real* bias, Matrix from, int64_t count, Matrix to) const {
    Product<Op> product{channels_, count, channels_, weight, constant(from)};
    product.row_bias = bias;
    multiply<Op, Output::kUnits>(product, to);
  }
  // to = relu(scale weight x' + shift) for first layer number `layer`.
  void project_first(Constant weight, int64_t layer, int64_t count, const Tile& t, Matrix to) const {
    project(weight, nullptr, t.x, count, to);
    const Real *scale = vector(p_.first_affine, 2 * layer), *shift = scale + channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      const Vec<Real> factor = splat(scale[c]), constant = splat(shift[c]), zero{};
      for_row(to, c, count,
              [&](int64_t i, int64_t) { store(to.data + i, at_least(zero, factor * load(to.data + i) + constant)); });
    }
  }
  // As project, added to what is there.
  void add_projection(Constant weight, Matrix from, int64_t count, Matrix to) const {
    multiply<Op, Output::kAccumulate>(Product<Op>{channels_, count, channels_, weight, constant(from)}, to);
  }
  // to += sum over tokens of left right^T, right with tokens as rows.
  void add_outer(Matrix left, Matrix right, int64_t count, Real* to) const {
    Product<Op> product{channels_, channels_, count, {left.data, 1, kPanel<Op> * left.row}, constant(right)};
    product.a_column = left.row;
    product.a_jump = left.panel - kPanel<Op>;
    multiply<Op, Output::kAccumulate>(product, row_major<Op>(to, channels_));
  }

  // The same in double, with x' in t.right.
  void add_outer_in_double(Matrix left, int64_t count, const Tile& t, double* to) const {
    const int64_t size = ceil_div(count, kPanel<Op>) * left.panel;
    for (int64_t i = 0; i < size; ++i) t.left[i] = static_cast<double>(left.data[i]);
    for (int64_t n = 0; n < count; n += kPanel<Op>) {
      Product<Float64> product{channels_,
                               channels_,
                               min64(count - n, kPanel<Op>),
                               {t.left + n / kPanel<Op> * left.panel, 1, kPanel<Float64> * left.row},
                               constant(rows_of(t.right + n * row_))};
      product.a_column = left.row;
      multiply<Float64, Output::kAccumulate>(product, rows_of(to));
    }
  }
  template <class T>
  Panels<T> rows_of(T* data) const {
    return {data, row_, kPanel<Float64>};
  }
  // to += sum over tokens of left x'^T: in double as asked of the pair, else added up in double by tile.
  void add_outer_of_input(int64_t pair, Matrix left, int64_t count, const Tile& t, double* to) const {
    if (precise(pair)) return add_outer_in_double(left, count, t, to);
    const int64_t size = channels_ * row_;
    std::memset(t.product, 0, sizeof(Real) * static_cast<size_t>(size));
    add_outer(left, t.x_rows, count, t.product);
    for (int64_t i = 0; i < size; ++i) to[i] += static_cast<double>(t.product[i]);
  }
  bool precise(int64_t pair) const { return static_cast<const bool*>(p_.precise)[pair]; }

  // q^ or k^ from the second layer and, where asked, their slopes.
  template <bool kSlope>
  void activate(int64_t pair, int64_t count, const Tile& t) const {
    const Real *bias = vector(p_.affine, 3 * pair), *scale = bias + channels_, *beta = scale + channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      const Vec<Real> before = splat(bias[c]), factor = splat(scale[c]), shift = splat(beta[c]);
      for_row(t.second, c, count, [&](int64_t i, int64_t) {
        const Vec<Real> a = factor * (load(t.second.data + i) + before) + shift;
        if constexpr (kSlope) {
          Vec<Real> value, slope;
          softplus_with_derivative(a, value, slope);
          store(t.activated.data + i, value);
          store(t.slope.data + i, slope);
        } else {
          store(t.activated.data + i, softplus(a));
        }
      });
    }
  }

  // The sum over tokens of f(place, token), which is zero behind the last token.
  template <class F>
  static Real row_sum(Matrix like, int64_t c, int64_t count, const F& f) {
    Vec<Real> sum{};
    for_row(like, c, count, [&](int64_t i, int64_t n) { sum += f(i, n); });
    return sum_lanes<Real>(sum);
  }

  // Adds t.grad_x to the gradient of a slot's features.
  void add_gradient(const Piece& piece, int64_t n, int64_t count, const Tile& t) const {
    const View& view = p_.grad_features[piece.slot];
    transpose_to_rows<Op>(constant(t.grad_x), channels_, count, t.rows);
    Real* to = reinterpret_cast<Real*>(view.data) + piece.row * view.batch_stride + n * view.token_stride;
    for (int64_t i = 0; i < count; ++i, to += view.token_stride) {
      const Real* from = t.rows.data + i * t.rows.row;
      if (view.channel_stride == 1) {
        for (int64_t c = 0; c < channels_; ++c) to[c] += from[c];
      } else {
        for (int64_t c = 0; c < channels_; ++c) to[c * view.channel_stride] += from[c];
      }
    }
  }

  const TrainingProblem& p_;
  int threads_;
  int64_t channels_, row_, tile_, tile_bytes_;
  Scratch tiles_;
  Pieces pieces_;
};

}  // namespace XATTN_ISA
}  // namespace xattn
