// Products of the pyramid's coarse levels, each at its own resolution: p = W_s x_s.
//
// Plan: weights of any type and strides are laid out once, so that all who read them copy whole rows. A
// block has some pixels of a sample and some hidden channels, kept in registers as the level's channels go
// by in pieces, the next one on its way. Products are stored with hidden channels side by side, as rows to
// be copied as well.
//
// Last, what is measured of z: partial moments of tiles, merged in double, in a fixed order.
#include "pyramid_levels.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kThreads = 128;

template <class Products>
class Block {
 public:
  using P = Products;
  using E = typename P::Element;
  static constexpr int kPixels = kProjectedPixels, kHidden = kProjectedHidden;
  static constexpr int kDepth = 128 / static_cast<int>(sizeof(E));
  static constexpr int kFeatures = tile_elements<P>(kDepth, kPixels), kWeights = kHidden * row_stride<P>(kDepth);
  static constexpr int kStage = (kFeatures + kWeights) * static_cast<int>(sizeof(E));
  static constexpr int kShared = 2 * kStage;
  static constexpr int kStride = kHidden + 8;  // of products on their way out
  static_assert(kStage % 16 == 0 && kPixels * kStride * static_cast<int>(sizeof(E)) <= kShared, "shared memory");

  XATTN_DEVICE Block(const PyramidProjection& args, int64_t work) : args_(args) {
    int level = 0;
    while (level + 1 < args.levels && work >= args.table[args.starts + level + 1]) ++level;
    work -= args.table[args.starts + level];
    x_ = args.table.view(args.features, level);
    channels_ = number(level, kChannels);
    weight_ = static_cast<const E*>(args.scratch.weights) + number(level, kWeight);
    const int64_t groups = (args.scratch.padded + kHidden - 1) / kHidden;
    hidden_ = work % groups * kHidden;
    const int64_t tiles = (x_.tokens + kPixels - 1) / kPixels;
    pixel_ = work / groups % tiles * kPixels;
    batch_ = work / groups / tiles;
    row_ = number(level, kRow) + batch_ * x_.tokens + pixel_;
  }

  XATTN_DEVICE void run() {
    pixels_ = within(x_.tokens - pixel_, kPixels);
    columns_ = within(args_.scratch.padded - hidden_, kHidden);
    x_access_ = access<E>(x_, args_.dtype);
    sum_.clear();
    load(0);
    XATTN_KEEP_LOOP
    for (int number = 0; static_cast<int64_t>(number) * kDepth < channels_; ++number) {
      wait_copies<0>();
      sync_threads();
      load(number + 1);
      multiply(number, padded(within(channels_ - static_cast<int64_t>(number) * kDepth, kDepth)));
    }
    sync_threads();
    store();
    sync_threads();
  }

 private:
  XATTN_DEVICE int64_t number(int level, LevelNumber which) const {
    return args_.table[args_.numbers + level * kLevelNumbers + which];
  }
  static XATTN_DEVICE int within(int64_t left, int most) { return static_cast<int>(left < most ? left : most); }
  static XATTN_DEVICE int padded(int width) { return (width + 15) / 16 * 16; }
  static XATTN_DEVICE int pixel_of_warp() { return warp() % 2 * 32; }
  static XATTN_DEVICE int hidden_of_warp() { return warp() / 2 * 64; }

  XATTN_DEVICE E* stage(int number) const { return reinterpret_cast<E*>(shared_memory() + number % 2 * kStage); }
  XATTN_DEVICE Tile<E> features(int number) const {
    return make_tile<P>(stage(number), x_access_.token_minor, kDepth, kPixels);
  }
  XATTN_DEVICE E* weights(int number) const { return stage(number) + kFeatures; }

  XATTN_DEVICE void load(int number) const {
    const int64_t channel = static_cast<int64_t>(number) * kDepth;
    if (channel < channels_) {
      const int depth = within(channels_ - channel, kDepth);
      load_tile(x_, x_access_, {batch_, channel, pixel_, depth, pixels_}, features(number), padded(depth),
                padded(pixels_));
      constexpr int kPer = 16 / static_cast<int>(sizeof(E));
      const int64_t row_step = (channels_ + 15) / 16 * 16;
      const E* from = weight_ + hidden_ * row_step + channel;
      E* to = weights(number);
      for_rows(columns_, padded(depth) / kPer, [&](int row, int i) {
        copy_async(to + row * row_stride<P>(kDepth) + i * kPer, from + row * row_step + i * kPer);
      });
    }
    commit_copies();
  }

  // Whole tiles by loops without a branch in them.
  XATTN_DEVICE void multiply(int number, int depth) {
    const Tile<E> x = features(number);
    const Operand<E> w{weights(number), row_stride<P>(kDepth), true};
    if (pixels_ < kPixels || columns_ < kHidden)
      multiply_add<P>(sum_, x.over_channels(), pixel_of_warp(), w, hidden_of_warp(), 0, depth,
                      padded(pixels_) - pixel_of_warp(), columns_ - hidden_of_warp());
    else if (x.token_minor)
      multiply_add<P>(sum_, {x.data, x.stride, false}, pixel_of_warp(), w, hidden_of_warp(), 0, depth);
    else
      multiply_add<P>(sum_, {x.data, x.stride, true}, pixel_of_warp(), w, hidden_of_warp(), 0, depth);
  }

  XATTN_DEVICE void store() {
    E* rows = reinterpret_cast<E*>(shared_memory());
    int wrong[4] = {0, 0, 0, 0};
    XATTN_UNROLL
    for (int m = 0; m < 2; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < 8; ++n) {
        XATTN_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float x = to_float(from_float<E>(sum_.v[m][n][2 * i]));
          const float y = to_float(from_float<E>(sum_.v[m][n][2 * i + 1]));
          if (x - x != 0.0f || y - y != 0.0f) wrong[2 * m + i] = 1;
        }
      }
    }
    sum_.for_pairs(padded(pixels_) - pixel_of_warp(), columns_ - hidden_of_warp(),
                   [&](int pixel, int hidden, float x, float y) {
                     store_pair(rows + (pixel_of_warp() + pixel) * kStride + hidden_of_warp() + hidden, x, y);
                   });
    const int64_t group = (hidden_ + hidden_of_warp()) / kFlagged;
    XATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      wrong[i] |= shuffle_xor(wrong[i], 1);
      wrong[i] |= shuffle_xor(wrong[i], 2);
      const int pixel = pixel_of_warp() + lane() / 4 + 8 * i;
      if (lane() % 4 == 0 && pixel < pixels_ && hidden_of_warp() < columns_)
        args_.scratch.flags[(row_ + pixel) * args_.scratch.flag_groups + group] = wrong[i];
    }
    sync_threads();
    struct alignas(16) Vector {
      uint32_t bits[4];
    };
    constexpr int kPer = 16 / static_cast<int>(sizeof(E));
    E* to = static_cast<E*>(args_.scratch.products) + row_ * args_.scratch.padded + hidden_;
    for_rows(pixels_, columns_ / kPer, [&](int pixel, int i) {
      *reinterpret_cast<Vector*>(to + pixel * args_.scratch.padded + i * kPer) =
          *reinterpret_cast<const Vector*>(rows + pixel * kStride + i * kPer);
    });
  }

  const PyramidProjection& args_;
  View x_;
  Access x_access_;
  const E* weight_;
  int64_t channels_, batch_, pixel_, hidden_, row_;
  int pixels_, columns_;  // hidden channels are columns
  Accumulator<2, 8> sum_;
};

template <class P>
constexpr int kPackShared = tile_elements<P>(kPackedTile, kPackedTile) * static_cast<int>(sizeof(typename P::Element));

template <class P>
XATTN_KERNEL(kThreads, 2)
pack_kernel(XATTN_PARAMETER PyramidWeightsLayout args) {
  using E = typename P::Element;
  const auto within = [](int64_t left) { return static_cast<int>(left < kPackedTile ? left : kPackedTile); };
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) {
    const auto number = [&](int matrix, MatrixNumber which) {
      return args.table[args.numbers + matrix * kMatrixNumbers + which];
    };
    int matrix = args.count - 1;
    while (matrix > 0 && work < number(matrix, kMatrixWork)) --matrix;
    const View view = args.table.view(args.views, matrix);
    const int64_t rows = number(matrix, kMatrixPadded), columns = number(matrix, kMatrixColumns);
    const int64_t across = (columns + kPackedTile - 1) / kPackedTile, tile_number = work - number(matrix, kMatrixWork);
    const int64_t row = tile_number / across * kPackedTile, column = tile_number % across * kPackedTile;
    const Access how = access<E>(view, args.dtype);
    const Tile<E> tile = make_tile<P>(reinterpret_cast<E*>(shared_memory()), how.token_minor, kPackedTile, kPackedTile);
    const int64_t rows_left = number(matrix, kMatrixRows) - row, columns_left = view.tokens - column;
    load_tile(view, how,
              {0, row, column, rows_left < 0 ? 0 : within(rows_left), columns_left < 0 ? 0 : within(columns_left)},
              tile, within(rows - row), within(columns - column));
    commit_copies();
    wait_copies<0>();
    sync_threads();
    E* to = static_cast<E*>(args.to) + number(matrix, kMatrixStart) + row * columns + column;
    for_rows(within(rows - row), within(columns - column), [&](int i, int j) { to[i * columns + j] = *tile.at(i, j); });
    sync_threads();
  }
}

template <class P>
XATTN_KERNEL(kThreads, 2)
project_kernel(XATTN_PARAMETER PyramidProjection args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<P>(args, work).run();
}

// body(kind of products) for a dtype.
template <class Body>
void with_products(Dtype dtype, bool tf32, const Body& body) {
  if (dtype == Dtype::kBFloat16)
    body(BFloat16Products());
  else if (dtype == Dtype::kFloat16 || tf32)
    body(Tf32Products());
  else
    body(IeeeProducts());
}

constexpr int kMerged = 32, kParts = 8;  // of a block that merges: hidden channels, and shares of the tiles
constexpr int kMergeShared = kMerged * kParts * static_cast<int>(sizeof(double));

// The sum of a channel's parts, in the order of these.
XATTN_DEVICE double sum_parts(double part) {
  double* parts = reinterpret_cast<double*>(shared_memory());
  parts[thread_index()] = part;
  sync_threads();
  double sum = 0.0;
  for (int i = 0; i < kParts; ++i) sum += parts[i * kMerged + thread_index() % kMerged];
  sync_threads();
  return sum;
}

// Chan, Golub and LeVeque: squared deviations from the mean of all are those from a tile's own and those of
// its mean.
XATTN_KERNEL(kMerged* kParts, 2) merge_kernel(XATTN_PARAMETER PyramidMoments args) {
  const int64_t rows = (args.height + args.tile_height - 1) / args.tile_height;
  const int64_t columns = (args.width + args.tile_width - 1) / args.tile_width;
  const auto within = [](int64_t left, int most) { return static_cast<double>(left < most ? left : most); };
  for (int64_t work = block_index(); work * kMerged < args.hidden; work += block_count()) {
    const int64_t channel = work * kMerged + thread_index() % kMerged;
    const int part = thread_index() / kMerged;
    const auto for_tiles = [&](const auto& body) {
      double sum = 0.0;
      if (channel >= args.hidden) return sum;
      XATTN_KEEP_LOOP
      for (int64_t i = part; i < args.batch * rows * columns; i += kParts) {
        const int64_t row = i / columns % rows, column = i % columns;
        const double count = within(args.height - row * args.tile_height, args.tile_height) *
                             within(args.width - column * args.tile_width, args.tile_width);
        const float* moments = args.partial + i * 2 * args.hidden + channel;
        sum += body(count, static_cast<double>(moments[0]), static_cast<double>(moments[args.hidden]));
      }
      return sum;
    };
    const double all = static_cast<double>(args.batch * args.height * args.width);
    const double mean = sum_parts(for_tiles([](double count, double x, double) { return count * x; })) / all;
    const double deviations = sum_parts(for_tiles(
        [mean](double count, double x, double squares) { return squares + count * (x - mean) * (x - mean); }));
    if (part == 0 && channel < args.hidden) {
      args.mean[channel] = static_cast<float>(mean);
      args.deviations[channel] = static_cast<float>(deviations);
    }
  }
}

}  // namespace

void start_pyramid_weights(const PyramidWeightsLayout& weights, Dtype dtype, bool tf32, Stream stream) {
  with_products(dtype, tf32, [&](auto products) {
    using P = decltype(products);
    launch(pack_kernel<P>, "pyramid_weights", weights.works, kThreads, kPackShared<P>, stream, weights);
  });
}

void start_pyramid_projection(const PyramidProjection& projection, bool tf32, Stream stream) {
  with_products(projection.dtype, tf32, [&](auto products) {
    using P = decltype(products);
    launch(project_kernel<P>, "pyramid_project", projection.works, kThreads, Block<P>::kShared, stream, projection);
  });
}

void start_pyramid_moments(const PyramidMoments& moments, Stream stream) {
  launch(merge_kernel, "pyramid_moments", (moments.hidden + kMerged - 1) / kMerged, kMerged * kParts, kMergeShared,
         stream, moments);
}

}  // namespace xattn::cuda
