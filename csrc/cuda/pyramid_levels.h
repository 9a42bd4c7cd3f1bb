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
  kChannels,
  kWeight,  // first element of its weights
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

// The weights as the kernels read them: (hidden, channels) of every level and the classifier (outputs,
// hidden), one after the other, rows side by side, all widths padded to multiples of 16 by zeros.
struct PyramidScratch {
  int64_t hidden, padded, flag_groups;
  int64_t channels, outputs;  // padded; of the finest level
  void *products, *weights;   // the finest level's are first
  int64_t classifier;         // its first element
  int* flags;
};

// Matrices of any strides, laid out like that, a tile of kPackedTile rows and columns a piece of work.
constexpr int kPackedTile = 64;
enum MatrixNumber : int { kMatrixRows, kMatrixPadded, kMatrixColumns, kMatrixStart, kMatrixWork, kMatrixNumbers };
struct PyramidWeightsLayout {
  Table table;
  Dtype dtype;
  int views, numbers;  // in the table: (channels, tokens) are (rows, columns); padded rows and columns, ...
  int count;
  int64_t works;
  void* to;
};

struct PyramidProjection {
  Table table;
  Dtype dtype;
  int features, numbers, starts;  // in the table; of coarse levels; first pieces of work of each
  int levels;
  int64_t batch, works;
  PyramidScratch scratch;
};

// Pixels of a piece of work, and hidden channels.
constexpr int kProjectedPixels = 64, kProjectedHidden = 128;

// In the element type of the dtype's products. The second projects the coarse levels.
void start_pyramid_weights(const PyramidWeightsLayout& weights, Dtype dtype, bool tf32, Stream stream);
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
