// What a block of the pyramid projection does with a tile of tokens; the plan is in pyramid_fwd.cu.
#pragma once

#include <type_traits>

#include "pyramid_levels.h"
#include "tile.h"

namespace xattn::cuda::pyramid {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kTokens = 32, kHidden = 64;  // of a warp: tokens, and hidden channels at most
constexpr int kPad = 8;                    // of rows of hidden channels

// kForward: from the levels to the output. kTraining: and store z or its moments. kStored: from a stored z.
enum class Mode { kForward, kTraining, kStored };

// Sizes that a call chooses. Offsets are bytes of shared memory.
struct Geometry {
  int height, width;    // of a tile; width is a multiple of 16, both are powers of two
  int tokens;           // height * width
  int hidden, columns;  // hidden channels at a time, of the block and of a warp
  int depth;            // of a piece of the left factor
  int slots;            // pixels around a tile, padded
  int outputs;          // at a time, padded
  int features, shares, rows, flags, corners, stages, stage, classifier, vectors, map, shared;
};

struct Arguments {
  Table table;
  Dtype dtype;
  int numbers, levels;  // in the table: of coarse levels
  int64_t batch, channels, hidden, outputs;
  int64_t height, width, tiles, groups, works;  // of the finest level; of tiles; of outputs
  View x, map, output;
  PyramidScratch scratch;
  const float *scale, *shift, *bias;
  float* moments;
  Geometry geometry;
};

template <class Products, int kOut, Mode kMode>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work) : args_(args), g_(args.geometry) {
    group_ = work % args.groups * g_.outputs;
    work /= args.groups;
    tile_ = work;
    const int64_t columns = (args.width + g_.width - 1) / g_.width;
    batch_ = work / args.tiles;
    work %= args.tiles;
    y_ = work / columns * g_.height;
    x_ = work % columns * g_.width;
    rows_ = within(args.height - y_, g_.height);
    columns_ = within(args.width - x_, g_.width);
    x_access_ = in_rows(args.x);
    map_access_ = in_rows(args.map);
    channel_pieces_ = kMode == Mode::kStored ? 1 : pieces(args.scratch.channels);
    pieces_ = channel_pieces_ + (kMode == Mode::kStored ? 0 : pieces(g_.slots));
  }

  XATTN_DEVICE void run() {
    load(0);
    if constexpr (kMode != Mode::kStored) {
      load_image(args_.x, x_access_, 0, static_cast<int>(args_.channels), features(),
                 static_cast<int>(args_.scratch.channels));
      commit_copies();
      place_slots();
      sync_threads();
      share_slots();
    }
    out_.clear();
    const int steps = static_cast<int>((args_.scratch.padded + g_.hidden - 1) / g_.hidden) * pieces_;
    XATTN_KEEP_LOOP
    for (int step = 0; step < steps; ++step) {
      wait_copies<0>();
      sync_threads();
      if (step + 1 < steps) load(step + 1);
      add(step);
      if (step % pieces_ + 1 == pieces_) finish(step);
    }
    sync_threads();
    if (args_.output.data != nullptr) store_outputs();
    sync_threads();
  }

 private:
  static XATTN_DEVICE int within(int64_t left, int most) { return static_cast<int>(left < most ? left : most); }
  static XATTN_DEVICE bool is_finite(float x) { return x - x == 0.0f; }
  template <class T>
  static XATTN_DEVICE T* shared(int offset) {
    return reinterpret_cast<T*>(shared_memory() + offset);
  }
  XATTN_DEVICE int pieces(int64_t depth) const { return static_cast<int>((depth + g_.depth - 1) / g_.depth); }

  XATTN_DEVICE int token_warps() const { return g_.tokens / kTokens; }
  XATTN_DEVICE int token_of_warp() const { return warp() % token_warps() * kTokens; }
  XATTN_DEVICE int column_of_warp() const { return warp() / token_warps() * g_.columns; }
  // Of a step: its first hidden channel, and what of the block's and of the warp's are there.
  XATTN_DEVICE int64_t hidden(int step) const { return static_cast<int64_t>(step / pieces_) * g_.hidden; }
  XATTN_DEVICE int hidden_left(int step) const { return within(args_.scratch.padded - hidden(step), g_.hidden); }
  // The same of all warps, so that nothing that lanes do together seems to depend on which they are: where
  // not all of the block's hidden channels are left, what lies past them is zero up to the last warp's.
  XATTN_DEVICE int columns_left(int step) const { return within(hidden_left(step), g_.columns); }
  XATTN_DEVICE int hidden_filled(int step) const { return g_.hidden - g_.columns + columns_left(step); }
  // Of the tile's token: whether it is in the image, and which one it is.
  XATTN_DEVICE bool inside(int token) const { return token / g_.width < rows_ && token % g_.width < columns_; }
  XATTN_DEVICE int64_t place(int token) const { return (y_ + token / g_.width) * args_.width + x_ + token % g_.width; }

  XATTN_DEVICE Tile<E> features() const {
    return make_tile<P>(shared<E>(g_.features), x_access_.token_minor, static_cast<int>(args_.scratch.channels),
                        g_.tokens);
  }
  XATTN_DEVICE int shares_stride() const { return g_.slots + P::kPad; }
  XATTN_DEVICE E* shares() const { return shared<E>(g_.shares); }
  XATTN_DEVICE int64_t* slot_rows() const { return shared<int64_t>(g_.rows); }
  // Of a level and a token: four times its first slot, and two bits that say if there is a next row, and a
  // next column; -1 outside of the image.
  XATTN_DEVICE int* corners() const { return shared<int>(g_.corners); }
  XATTN_DEVICE E* left(int step) const { return shared<E>(g_.stages + step % 2 * g_.stage); }
  XATTN_DEVICE E* classifier(int step) const { return shared<E>(g_.stages + step % 2 * g_.stage + g_.classifier); }
  XATTN_DEVICE float* vectors(int step) const { return shared<float>(g_.stages + step % 2 * g_.stage + g_.vectors); }
  XATTN_DEVICE Tile<E> stored(int step) const {
    return make_tile<P>(left(step), map_access_.token_minor, g_.hidden, g_.tokens);
  }

  // Copies that begin in the middle of a row of tokens are as wide as the image's rows allow.
  XATTN_DEVICE Access in_rows(const View& view) const {
    Access found = access<E>(view, args_.dtype);
    if (found.token_minor && g_.height > 1)
      while (found.bytes > 0 && args_.width * storage_bytes(args_.dtype) % found.bytes != 0) found.bytes /= 2;
    if (found.bytes < 4) found.bytes = 0;
    return found;
  }

  // Channels of the tile's tokens, a row of the image at a time.
  XATTN_DEVICE void load_image(const View& view, const Access& how, int64_t channel, int channels, const Tile<E>& to,
                               int padded_channels) const {
    XATTN_KEEP_LOOP
    for (int row = 0; row < g_.height; ++row) {
      const bool there = row < rows_;
      const Place from{batch_, channel, there ? (y_ + row) * args_.width + x_ : 0, channels, there ? columns_ : 0};
      load_tile(view, how, from, Tile<E>{to.at(0, row * g_.width), to.stride, to.token_minor}, padded_channels,
                g_.width);
    }
  }

  // Rows of `elements` of which `from(row)` gives the address, null: none, and zeros up to `filled`; both
  // are multiples of 16.
  template <class From>
  XATTN_DEVICE void copy_rows(int rows, int elements, int filled, E* to, int stride, const From& from) const {
    constexpr int kPer = 16 / static_cast<int>(sizeof(E));
    for_rows(rows, filled / kPer, [&](int row, int i) {
      const E* there = i * kPer < elements ? from(row) : nullptr;
      copy_async(to + row * stride + i * kPer, there != nullptr ? there + i * kPer : static_cast<const E*>(nothing()),
                 there != nullptr ? 16 : 0);
    });
  }
  XATTN_DEVICE const void* nothing() const { return args_.scratch.weights; }

  XATTN_DEVICE void load(int step) const {
    const PyramidScratch& scratch = args_.scratch;
    const int piece = step % pieces_, count = hidden_left(step), filled = hidden_filled(step);
    const int64_t first = hidden(step);
    const E* weights = static_cast<const E*>(scratch.weights);
    if constexpr (kMode == Mode::kStored) {
      load_image(args_.map, map_access_, first, within(args_.hidden - first, g_.hidden), stored(step), filled);
    } else if (piece < channel_pieces_) {
      const int64_t channel = static_cast<int64_t>(piece) * g_.depth;
      const int depth = within(scratch.channels - channel, g_.depth);
      const E* from = weights + first * scratch.channels + channel;
      copy_rows(filled, depth, depth, left(step), row_stride<P>(g_.depth),
                [&](int row) { return row < count ? from + row * scratch.channels : static_cast<const E*>(nullptr); });
    } else {
      const int slot = (piece - channel_pieces_) * g_.depth;
      const int64_t* rows = slot_rows() + slot;
      const E* from = static_cast<const E*>(scratch.products) + first;
      copy_rows(within(g_.slots - slot, g_.depth), count, filled, left(step), g_.hidden + kPad, [&](int row) {
        return rows[row] < 0 ? static_cast<const E*>(nullptr) : from + rows[row] * scratch.padded;
      });
    }
    if (piece + 1 == pieces_ && args_.output.data != nullptr) {
      const E* from = weights + scratch.classifier + group_ * scratch.padded + first;
      copy_rows(within(scratch.outputs - group_, g_.outputs), count, filled, classifier(step), g_.hidden + kPad,
                [&](int row) { return from + row * scratch.padded; });
      for (int i = thread_index(); i < 2 * g_.hidden; i += kThreads) {
        const int64_t channel = first + i % g_.hidden;
        const float* vector = i < g_.hidden ? args_.scale : args_.shift;
        const bool there = channel < args_.hidden;
        copy_async<4>(vectors(step) + i, vector + (there ? channel : 0), there ? 4 : 0);
      }
    }
    commit_copies();
  }

  XATTN_DEVICE int64_t number(int level, LevelNumber which) const {
    return args_.table[args_.numbers + level * kLevelNumbers + which];
  }
  // First pixel, along an axis, of those around the tile, which begins at `begin` of `length`.
  XATTN_DEVICE int64_t pixel_of(int slot, bool apart, int64_t begin, int64_t length, int64_t size) const {
    const int64_t at = begin + (apart ? slot / 2 : 0);
    const int64_t pixel = tap(at < length ? at : length - 1, length, size).first + (apart ? slot % 2 : slot);
    return pixel < size ? pixel : size - 1;
  }

  // Which row of the products every slot has, and whether any of these is infinite or NaN.
  XATTN_DEVICE void place_slots() const {
    bool wrong = false;
    XATTN_KEEP_LOOP
    for (int i = thread_index(); i < g_.slots; i += kThreads) {
      int level = args_.levels - 1;
      while (level > 0 && i < number(level, kSlot)) --level;
      const int slot = i - static_cast<int>(number(level, kSlot)), columns = static_cast<int>(number(level, kColumns));
      int64_t row = -1;
      if (slot < columns * number(level, kRows)) {
        const int64_t height = number(level, kHeight), width = number(level, kWidth);
        const int64_t y = pixel_of(slot / columns, number(level, kRowsApart) != 0, y_, args_.height, height);
        const int64_t x = pixel_of(slot % columns, number(level, kColumnsApart) != 0, x_, args_.width, width);
        row = number(level, kRow) + (batch_ * height + y) * width + x;
        const int* flags = args_.scratch.flags + row * args_.scratch.flag_groups;
        for (int64_t group = 0; group < args_.scratch.flag_groups; ++group) wrong = wrong || flags[group] != 0;
      }
      slot_rows()[i] = row;
    }
    const bool any_wrong = any(wrong);
    if (lane() == 0) shared<int>(g_.flags)[warp()] = any_wrong ? 1 : 0;
    for_rows(g_.tokens, shares_stride(),
             [&](int token, int i) { shares()[token * shares_stride() + i] = from_float<E>(0.0f); });
  }

  // The shares that slots have in tokens, and where the four of a token and a level are.
  XATTN_DEVICE void share_slots() {
    flagged_ = false;
    for (int i = 0; i < kWarps; ++i) flagged_ = flagged_ || shared<int>(g_.flags)[i] != 0;
    XATTN_KEEP_LOOP
    for (int i = thread_index(); i < g_.tokens * args_.levels; i += kThreads) {
      const int token = i % g_.tokens, level = i / g_.tokens;
      corners()[i] = -1;
      if (!inside(token)) continue;
      const int64_t height = number(level, kHeight), width = number(level, kWidth);
      const int row = token / g_.width, column = token % g_.width;
      const Tap y = tap(y_ + row, args_.height, height), x = tap(x_ + column, args_.width, width);
      const int rows_before = number(level, kRowsApart) != 0 ? 2 * row : y.first - tap(y_, args_.height, height).first;
      const int columns_before =
          number(level, kColumnsApart) != 0 ? 2 * column : x.first - tap(x_, args_.width, width).first;
      const int columns = static_cast<int>(number(level, kColumns));
      const int corner = static_cast<int>(number(level, kSlot)) + rows_before * columns + columns_before;
      corners()[i] = 4 * corner + (y.inside ? 2 : 0) + (x.inside ? 1 : 0);
      E* to = shares() + token * shares_stride() + corner;
      to[0] = from_float<E>((1.0f - y.share) * (1.0f - x.share));
      if (x.inside) to[1] = from_float<E>((1.0f - y.share) * x.share);
      if (y.inside) to[columns] = from_float<E>(y.share * (1.0f - x.share));
      if (x.inside && y.inside) to[columns + 1] = from_float<E>(y.share * x.share);
    }
  }

  // One piece of z.
  XATTN_DEVICE void add(int step) {
    const int piece = step % pieces_, columns = columns_left(step);
    if (piece == 0) sum_.clear();
    if constexpr (kMode == Mode::kStored) {
      const Tile<E> z = stored(step);
      const int g = lane() / 4, t = lane() % 4;
      XATTN_UNROLL
      for (int n = 0; n < 8; ++n) {
        if (8 * n >= columns) continue;
        XATTN_UNROLL
        for (int i = 0; i < 8; ++i)
          sum_.v[i / 4][n][i % 4] = to_float(
              *z.at(column_of_warp() + 8 * n + 2 * t + i % 2, token_of_warp() + 16 * (i / 4) + g + i % 4 / 2 * 8));
      }
    } else if (piece < channel_pieces_) {
      const int channel = piece * g_.depth;
      const Tile<E> x = features();
      multiply({x.at(channel, 0), x.stride, !x.token_minor}, {left(step), row_stride<P>(g_.depth), true},
               within(args_.scratch.channels - channel, g_.depth), columns);
    } else {
      const int slot = (piece - channel_pieces_) * g_.depth, depth = within(g_.slots - slot, g_.depth);
      if (flagged_) {
        for_rows(depth, hidden_left(step), [&](int row, int column) {
          E* x = left(step) + row * (g_.hidden + kPad) + column;
          if (!is_finite(to_float(*x))) *x = from_float<E>(0.0f);
        });
        sync_threads();
      }
      multiply({shares() + slot, shares_stride(), true}, {left(step), g_.hidden + kPad, false}, depth, columns);
    }
  }
  XATTN_DEVICE void multiply(const Operand<E>& tokens, const Operand<E>& hidden, int depth, int columns) {
    if (columns == kHidden)
      multiply_add<P>(sum_, tokens, token_of_warp(), hidden, column_of_warp(), 0, depth);
    else
      multiply_add<P>(sum_, tokens, token_of_warp(), hidden, column_of_warp(), 0, depth, kTokens, columns);
  }

  // body(value of z, hidden channel, token): of this lane; channels count from the block's first.
  template <class Body>
  XATTN_DEVICE void for_sums(int columns, const Body& body) {
    const int g = lane() / 4, t = lane() % 4;
    XATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < 8; ++n) {
        if (8 * n >= columns) continue;
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i)
          body(sum_.v[m][n][i], column_of_warp() + 8 * n + 2 * t + i % 2, token_of_warp() + 16 * m + g + i / 2 * 8);
      }
    }
  }

  // A block of hidden channels is complete.
  XATTN_DEVICE void finish(int step) {
    const int columns = columns_left(step);
    if constexpr (kMode != Mode::kStored) {
      if (flagged_) {
        XATTN_KEEP_LOOP
        for (int i = 0; i < 4 * args_.levels; ++i) add_infinite(step, i / 4, i % 4);
      }
    }
    if constexpr (kMode == Mode::kTraining) keep(step);
    if (args_.output.data == nullptr) return;
    const float *scale = vectors(step), *shift = scale + g_.hidden;
    for_sums(columns, [&](float& z, int column, int) {
      z = fused_multiply_add(scale[column], z, shift[column]);
      z = z < 0.0f ? 0.0f : z;
    });
    const Operand<E> v{classifier(step) + column_of_warp(), g_.hidden + kPad, true};
    const int outputs = within(args_.scratch.outputs - group_, g_.outputs);
    // Rows of z are tokens: it is a left operand as it lies.
    if (columns == kHidden)
      multiply_add<P>(out_, sum_, v, 0, 0, outputs);
    else
      multiply_add<P>(out_, sum_, v, 0, 0, outputs, columns);
  }

  // The products that are infinite or NaN, of the pixels that a token lies between: `tap` is one of the four.
  XATTN_DEVICE void add_infinite(int step, int level, int tap) {
    const E* products = static_cast<const E*>(args_.scratch.products) + hidden(step) + column_of_warp();
    const int columns = columns_left(step), g = lane() / 4, t = lane() % 4;
    const int next = tap % 2 + (tap / 2 != 0 ? static_cast<int>(number(level, kColumns)) : 0);
    XATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int token = token_of_warp() + g + 8 * i, corner = corners()[level * g_.tokens + token];
      if (corner < 0 || (tap & ~corner & 3) != 0) continue;
      const int slot = corner / 4 + next;
      const float share = to_float(shares()[token * shares_stride() + slot]);
      const E* row = products + slot_rows()[slot] * args_.scratch.padded + 2 * t;
      XATTN_UNROLL
      for (int n = 0; n < 8; ++n) {
        if (8 * n >= columns) continue;
        XATTN_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float p = to_float(row[8 * n + j]);
          if (!is_finite(p)) sum_.v[i / 2][n][i % 2 * 2 + j] += share * p;
        }
      }
    }
  }

  // Stores z, and mean and squared deviations of every hidden channel in this tile.
  XATTN_DEVICE void keep(int step) {
    float* kept = shared<float>(g_.map);
    const int stride = g_.tokens + 4, count = within(args_.hidden - hidden(step), g_.hidden);
    for_sums(columns_left(step), [&](float& z, int column, int token) { kept[column * stride + token] = z; });
    sync_threads();
    if (group_ != 0) return;
    if (args_.map.data != nullptr)
      store(args_.map, hidden(step), count, [&](int channel, int token) { return kept[channel * stride + token]; });
    if (args_.moments == nullptr) return;
    const float tokens = static_cast<float>(rows_ * columns_);
    XATTN_KEEP_LOOP
    for (int channel = warp(); channel < count; channel += kWarps) {
      const float* z = kept + channel * stride;
      const float mean = sum_tokens([&](int token) { return z[token]; }) / tokens;
      const float deviations = sum_tokens([&](int token) { return (z[token] - mean) * (z[token] - mean); });
      if (lane() == 0) {
        float* to = args_.moments + tile_ * 2 * args_.hidden + hidden(step) + channel;
        to[0] = mean;
        to[args_.hidden] = deviations;
      }
    }
  }
  template <class Value>
  XATTN_DEVICE float sum_tokens(const Value& value) const {
    float sum = 0.0f;
    for (int token = lane(); token < g_.tokens; token += kWarp)
      if (inside(token)) sum += value(token);
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    return sum;
  }

  // value(row, token) to channels [first, first + count) of the tile's tokens.
  template <class Value>
  XATTN_DEVICE void store(const View& view, int64_t first, int count, const Value& value) const {
    const bool token_minor = is_token_minor(view);
    for_rows(token_minor ? count : g_.tokens, token_minor ? g_.tokens : count, [&](int row, int i) {
      const int channel = token_minor ? row : i, token = token_minor ? i : row;
      if (!inside(token)) return;
      store_element(
          view.data, args_.dtype,
          batch_ * view.batch_stride + (first + channel) * view.channel_stride + place(token) * view.token_stride,
          value(channel, token));
    });
  }

  // Warps of the same tokens one after another, then all of it, with the bias, to global memory.
  XATTN_DEVICE void store_outputs() {
    float* sums = shared<float>(g_.stages);
    const int stride = g_.tokens + 4, count = within(args_.outputs - group_, g_.outputs);
    XATTN_KEEP_LOOP
    for (int turn = 0; turn < kWarps / token_warps(); ++turn) {
      if (warp() / token_warps() == turn)
        out_.for_pairs(2 * 16, within(args_.scratch.outputs - group_, g_.outputs),
                       [&](int row, int output, float x, float y) {
                         float* to = sums + output * stride + token_of_warp() + row;
                         to[0] = turn == 0 ? x : to[0] + x;
                         to[stride] = turn == 0 ? y : to[stride] + y;
                       });
      sync_threads();
    }
    store(args_.output, group_, count,
          [&](int output, int token) { return sums[output * stride + token] + args_.bias[group_ + output]; });
  }

  const Arguments& args_;
  const Geometry& g_;
  Access x_access_, map_access_;
  int64_t group_, tile_, batch_, y_, x_;
  int rows_, columns_, channel_pieces_, pieces_;
  bool flagged_;
  Accumulator<kTokens / 16, kHidden / 8> sum_;
  Accumulator<kTokens / 16, kOut> out_;
};

}  // namespace xattn::cuda::pyramid
