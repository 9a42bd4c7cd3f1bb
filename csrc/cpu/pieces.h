// Work of an operator cut into pieces: ranges of tokens of (slot, row) pairs, numbered for parallel_for.
#pragma once

#include "simd.h"

namespace xattn {
namespace XATTN_ISA {

struct Piece {
  int64_t slot, row, part, begin, count;
};

class Pieces {
 public:
  // Every slot has `rows` rows (batch entries, or batch entries times heads) of its view's tokens;
  // step(tokens) is the length of a piece. Slots for which `keep` is false have none.
  template <class Step, class Keep>
  Pieces(Span<const View> views, int64_t rows, const Step& step, const Keep& keep)
      : views_(views), memory_(sizeof(int64_t) * static_cast<size_t>(3 * views.size + 1)) {
    first_ = reinterpret_cast<int64_t*>(memory_.data());
    step_ = first_ + views.size + 1;
    parts_ = step_ + views.size;
    first_[0] = 0;
    for (int64_t s = 0; s < views.size; ++s) {
      step_[s] = step(views[s].tokens);
      parts_[s] = keep(s) ? ceil_div(views[s].tokens, step_[s]) : 0;
      first_[s + 1] = first_[s] + rows * parts_[s];
    }
  }
  template <class Step>
  Pieces(Span<const View> views, int64_t rows, const Step& step)
      : Pieces(views, rows, step, [](int64_t) { return true; }) {}

  int64_t total() const { return first_[views_.size]; }
  int64_t parts(int64_t slot) const { return parts_[slot]; }
  int64_t number(int64_t slot, int64_t row, int64_t part) const { return first_[slot] + row * parts_[slot] + part; }
  Piece operator[](int64_t index) const {
    int64_t slot = 0, end = views_.size;  // the last slot whose first piece is not after index
    while (end - slot > 1) {
      const int64_t middle = (slot + end) / 2;
      (first_[middle] <= index ? slot : end) = middle;
    }
    const int64_t row = (index - first_[slot]) / parts_[slot], part = (index - first_[slot]) % parts_[slot];
    const int64_t begin = part * step_[slot];
    return {slot, row, part, begin, min64(step_[slot], views_[slot].tokens - begin)};
  }

 private:
  Span<const View> views_;
  Scratch memory_;
  int64_t *first_, *step_, *parts_;
};

}  // namespace XATTN_ISA
}  // namespace xattn
