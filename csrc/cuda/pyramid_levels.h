// What the kernels of the pyramid projection share: the levels in a table, how samples lie between pixels,
// and the first of two launches.
#pragma once

#include "table.h"

namespace xattn::cuda {

// Sample `j` of `length` among `size` ones, align_corners=False: it is (1 - share) of sample `first` and
// `share` of the next one. `inside`: there is a next one; else share is 0.
struct Tap {
  int first;
  bool inside;
  float share;
};
XATTN_BOTH Tap tap(int64_t j, int64_t length, int64_t size) {
  int64_t position = (2 * j + 1) * size - length;
  if (position < 0) position = 0;
  const int64_t first = position / (2 * length), rest = position - first * 2 * length;
  const bool inside = first + 1 < size;
  return {static_cast<int>(first), inside, inside ? static_cast<float>(rest) / static_cast<float>(2 * length) : 0.0f};
}

// Numbers of a coarse level in a table.
enum LevelNumber : int {
  kHeight,
  kWidth,
  kRow,  // of its products: that of pixel 0 of sample 0
  // The pixels that the tokens of a tile lie between: rows by columns of them, and where they begin among
  // those of all levels. A row or column is apart if two of them belong to every one of the tile's tokens,
  // else they are neighbours.
  kSlot,
  kRows,
  kColumns,
  kRowsApart,
  kColumnsApart,
  kLevelNumbers
};

// Products of the coarse levels, a row of `padded` hidden channels, side by side, for every pixel of every
// sample of every level: in the element type of the products that they go into. For every kFlagged hidden
// channels of a row there is a flag: whether one of them is infinite or NaN.
constexpr int kFlagged = 64;

// The weights as the second launch reads them: the finest level's (padded, channels), the classifier
// (outputs, padded), all of them multiples of 16, zero past what the tensors have.
struct PyramidScratch {
  int64_t hidden, padded, flag_groups;
  int64_t channels, outputs;  // padded
  void *products, *weight, *classifier;
  int* flags;
};

struct PyramidProjection {
  Table table;
  Dtype dtype, weight_dtype;
  int features, weights, numbers, starts;  // in the table; of coarse levels; first pieces of work of each
  int levels;
  int64_t batch, outputs;
  int64_t works, packs;     // of products; of the other weights
  View weight, classifier;  // (channels, tokens): (hidden, channels) of the finest level, (outputs, hidden)
  PyramidScratch scratch;
};

// Pixels of a piece of work, and hidden channels.
constexpr int kProjectedPixels = 64, kProjectedHidden = 128;

// Projects the coarse levels and lays out the other weights, in the element type of the dtype's products.
void start_pyramid_projection(const PyramidProjection& projection, bool tf32, Stream stream);

// Partial moments, (works, 2, hidden): mean and sum of squared deviations of every tile, and its tokens.
struct PyramidMoments {
  const float* partial;
  int64_t hidden, batch, height, width;
  int tile_height, tile_width;
  float *mean, *deviations;
};
void start_pyramid_moments(const PyramidMoments& moments, Stream stream);

}  // namespace xattn::cuda
