// Source pass of the cross-attention block for sm_90a: h = relu(W_k1 x), k = softplus(W_k2 h), v = relu(W_v x), and
// over chunks of tokens S = sum_n v_n k_n^T, Z = sum_n k_n.
//
// Plan: a block has the three matrices of a set of weights in shared memory, fetched by bulk copies when the set
// changes, and goes through the tokens of a chunk. Each of its warpgroups has 64 tokens of a tile as rows of products:
// x from shared memory, h from registers. k and v go to shared memory, and S is a product over tokens of what lies
// there, kept in registers for a chunk. Its rows come in 64 anyway: Z is one of them, that of a value which is 1.
// Warpgroups sum their own tokens and are added up at the end, in order; where S is too wide for that, each has some
// of its columns, over the tokens of all.
#if defined(XATTN_HAVE_SM90A) || defined(XATTN_TWIN)
#include "block_sm90.h"
#include "maths.h"
#include "sm90_tile.h"

namespace xattn::cuda {
namespace {

constexpr int kStride = kWideTokens / 8 * kCore;  // between eights of channels of v and k

// kColumns: of a product, and of S in a warpgroup; kRowTiles: of S, 64 rows each, one more than kWidth at least.
template <int kColumns_, int kSlices_, int kRowTiles_, int kGroups_, int kBlocks_>
struct Shape {
  static constexpr int kColumns = kColumns_, kSlices = kSlices_, kRowTiles = kRowTiles_, kGroups = kGroups_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kWidth = kColumns * kSlices, kDepth = (kWidth + 15) / 16 * 16, kSteps = kDepth / 16;
  static constexpr int kThreads = kGroups * kWarpgroup, kTokens = kGroups * kWideTokens;
  static constexpr bool kShared = kSlices > 1;  // whether warpgroups share S by columns
  static constexpr int kMatrix = kWidth * kDepth * 2, kWeights = 3 * kMatrix, kBiases = 3 * kDepth * 4;
  // Eights of channels of k: slices are written in sixteens.
  static constexpr int kEights = (kSlices - 1) * kColumns / 8 + (kColumns + 15) / 16 * 2;
  static constexpr int kTile = (kEights > kDepth / 8 ? kEights : kDepth / 8) * kStride,
                       kValues = 64 * kRowTiles * kWideTokens * 2;
  static constexpr int kSums = 64 * kRowTiles * kColumns * 4;
  static constexpr int kBarriers = 128;
  // Tiles of x, the next one on its way while k has a place of its own; or k takes that of x.
  static constexpr bool kApart = !kShared;
  static constexpr int kStages = kApart ? 2 : 1, kTiles = kApart ? 3 : 1;
  static constexpr int kWeightRoom = (kWeights + kBiases + 127) / 128 * 128;
  static constexpr int kBytes = kBarriers + kWeightRoom + kGroups * (kTiles * kTile + kValues);
  static_assert(!kShared || kGroups == kSlices, "a slice of columns for each warpgroup");
  static_assert(64 * kRowTiles > kWidth, "a row for Z");
  static_assert(kShared || kSums <= kGroups * kTiles * kTile, "sums take the place of tiles");
};

struct Arguments {
  Table table;
  PackedBlock packed;
  float* partial;
  int64_t works;
  int batch, channels, chunk;
  int features, pairs, first;  // in the table
};

template <class S>
class Block {
 public:
  XATTN_DEVICE explicit Block(const Arguments& args) : args_(args) {}

  XATTN_DEVICE void run() {
    if (thread_index() == 0) start_mbarrier(full(), 1);
    write_ones();
    sync_threads();
    const int end = static_cast<int>(args_.works * (block_index() + 1) / block_count());
    int weight = -1, parity = 1;
    XATTN_KEEP_LOOP
    for (int work = static_cast<int>(args_.works * block_index() / block_count()); work < end; ++work) {
      locate(work);
      const bool fresh = weight != pair_number(1);
      if (fresh) {
        weight = pair_number(1);
        parity ^= 1;
        fetch_weights(weight);
      }
      load(0);
      if (fresh) wait_phase(full(), parity);
      sum_chunk(work);
    }
  }

 private:
  using Sums = float[S::kColumns / 2];
  using Features = WideFragments<S::kSteps>;
  using Slice = WideFragments<(S::kColumns + 15) / 16>;

  XATTN_DEVICE Mbarrier* full() const { return reinterpret_cast<Mbarrier*>(shared_memory()); }
  XATTN_DEVICE char* weights() const { return shared_memory() + S::kBarriers; }
  XATTN_DEVICE const float* bias(int number) const {
    return reinterpret_cast<const float*>(weights() + S::kWeights) + number * S::kDepth;
  }
  XATTN_DEVICE const char* slice(int matrix, int i) const {
    return weights() + matrix * S::kMatrix + i * S::kColumns * S::kDepth * 2;
  }
  XATTN_DEVICE char* tiles() const { return weights() + S::kWeightRoom; }
  // x, k and v of a warpgroup; values of all, then keys of all.
  XATTN_DEVICE char* values_of(int group) const { return tiles() + group * S::kValues; }
  XATTN_DEVICE char* x_of(int group, int stage) const {
    return tiles() + S::kGroups * S::kValues + (stage * S::kGroups + group) * S::kTile;
  }
  XATTN_DEVICE char* keys_of(int group) const { return x_of(group, S::kApart ? S::kStages : 0); }

  // The row of Z, where products do not reach it: cores of 8 channels behind the last of v, of which the first is 1.
  XATTN_DEVICE void write_ones() const {
    if (args_.channels != S::kDepth || thread_of_group() >= kWideTokens) return;
    const CoreTile tile = core_tile(values_of(warpgroup()), false, 64 * S::kRowTiles);
    uint32_t* row = reinterpret_cast<uint32_t*>(tile.row(thread_of_group(), S::kDepth));
    row[0] = pack_bfloat16(1.0f, 0.0f);
    row[1] = row[2] = row[3] = 0;
  }

  XATTN_DEVICE int first(int pair) const { return static_cast<int>(args_.table[args_.first + pair]); }
  XATTN_DEVICE int pair_number(int i) const { return static_cast<int>(args_.table[args_.pairs + 2 * pair_ + i]); }
  XATTN_DEVICE View view() const { return args_.table.view(args_.features, pair_number(0)); }

  XATTN_DEVICE void locate(int work) {
    const int chunk = work / args_.batch;
    batch_ = work % args_.batch;
    while (chunk >= first(pair_ + 1)) ++pair_;
    const int64_t tokens = view().tokens;
    begin_ = (chunk - first(pair_)) * args_.chunk;
    end_ = static_cast<int>(begin_ + args_.chunk < tokens ? begin_ + args_.chunk : tokens);
  }

  // Everybody has passed a barrier since the last product by the weights before.
  XATTN_DEVICE void fetch_weights(int weight) const {
    if (thread_index() != 0) return;
    const int64_t number = static_cast<int64_t>(weight) * kProjections + kKey1;
    constexpr int64_t kPacked = static_cast<int64_t>(S::kDepth) * S::kDepth * 2;
    arrive_expecting(full(), S::kWeights + S::kBiases);
    XATTN_KEEP_LOOP
    for (int i = 0; i < 3; ++i)
      copy_bulk(weights() + i * S::kMatrix, args_.packed.matrices + (number + i) * kPacked, S::kMatrix, full());
    copy_bulk(weights() + S::kWeights, args_.packed.biases + number * S::kDepth, S::kBiases, full());
  }

  XATTN_DEVICE int token(int number) const { return begin_ + number * S::kTokens + warpgroup() * kWideTokens; }
  XATTN_DEVICE int tokens(int number) const {
    const int left = end_ - token(number);
    return left < 0 ? 0 : left < kWideTokens ? left : kWideTokens;
  }
  XATTN_DEVICE CoreTile x_tile(int number) const {
    return core_tile(x_of(warpgroup(), number % S::kStages), is_token_minor(view()), S::kDepth);
  }

  XATTN_DEVICE void load(int number) const {
    if (begin_ + number * S::kTokens < end_) {
      const View x = view();
      load_cores(x, access<BFloat16>(x, Dtype::kBFloat16),
                 {batch_, 0, tokens(number) > 0 ? token(number) : 0, args_.channels, tokens(number)}, x_tile(number));
    }
    commit_copies();
  }

  static XATTN_DEVICE int group_barrier() { return 1 + warpgroup(); }

  // h = relu(W_k1 x).
  template <int kSlice = 0>
  XATTN_DEVICE void project(Features& h, const CoreTile& x) const {
    Sums sums;
    start_with(sums, bias(0) + kSlice * S::kColumns);
    multiply_tile<S::kSteps>(sums, x, slice(0, kSlice));
    finish_products(sums);
    h.template set<kSlice * S::kColumns / 8>(sums, [](float a, float b) { return pack_bfloat16_relu(a, b); });
    if constexpr (kSlice + 1 < S::kSlices)
      project<kSlice + 1>(h, x);
    else
      h.template clear_from<S::kWidth>(args_.channels);
  }
  // Keys of h to shared memory, zero beyond the last token; values of x, and that of Z.
  XATTN_DEVICE void write_keys(Features& h, char* to, int tokens) const {
    XATTN_UNROLL
    for (int i = 0; i < S::kSlices; ++i) {
      Sums sums;
      start_with(sums, bias(1) + i * S::kColumns);
      multiply_fragments(sums, h, slice(1, i), true);
      finish_products(sums);
      Slice k;
      k.template set<0>(sums, [](float a, float b) { return pack_bfloat16(softplus<false>(a), softplus<false>(b)); });
      k.template clear_from<S::kColumns>(args_.channels - i * S::kColumns);
      k.clear_rows_from(tokens);
      write(k, to, i);
    }
  }
  XATTN_DEVICE void write_values(const CoreTile& x, char* to) const {
    XATTN_UNROLL
    for (int i = 0; i < S::kSlices; ++i) {
      Sums sums;
      start_with(sums, bias(2) + i * S::kColumns);
      multiply_tile<S::kSteps>(sums, x, slice(2, i));
      finish_products(sums);
      Slice v;
      v.template set<0>(sums, [](float a, float b) { return pack_bfloat16_relu(a, b); });
      v.template clear_from<S::kColumns>(args_.channels - i * S::kColumns);
      if (i + 1 == S::kSlices) v.template set_one<S::kColumns>(args_.channels - i * S::kColumns);
      write(v, to, i);
    }
  }
  // What a slice has too many in its last step, the next one writes again.
  XATTN_DEVICE void write(const Slice& slice, char* to, int i) const {
    slice.store(core_tile(to + i * (S::kColumns / 8) * kStride, false, S::kColumns));
  }

  XATTN_DEVICE void sum_chunk(int work) {
    float s[S::kRowTiles][S::kColumns / 2];
    XATTN_UNROLL
    for (int m = 0; m < S::kRowTiles; ++m) {
      XATTN_UNROLL
      for (int i = 0; i < S::kColumns / 2; ++i) s[m][i] = 0.0f;
    }
    XATTN_KEEP_LOOP
    for (int number = 0; begin_ + number * S::kTokens < end_; ++number) {
      wait_copies<0>();
      fence_async();
      sync_some(group_barrier(), kWarpgroup);
      if (S::kStages == 2) load(number + 1);
      const CoreTile x = x_tile(number);
      write_values(x, values_of(warpgroup()));
      Features h;
      project(h, x);
      if (!S::kApart) sync_some(group_barrier(), kWarpgroup);  // x has been read
      write_keys(h, keys_of(warpgroup()), tokens(number));
      fence_async();
      if constexpr (S::kShared)
        sync_threads();
      else
        sync_some(group_barrier(), kWarpgroup);
      add_products(s);
      if constexpr (S::kShared) sync_threads();  // others multiply by these keys as well
      if (S::kStages == 1) load(number + 1);
    }
    finish(s, work);
  }

  // s += v^T k over the tokens of this warpgroup, or of all for its columns.
  XATTN_DEVICE void add_products(float (&s)[S::kRowTiles][S::kColumns / 2]) const {
    const int column = S::kShared ? warpgroup() * S::kColumns / 8 * kStride : 0;
    XATTN_UNROLL
    for (int m = 0; m < S::kRowTiles; ++m) hold(s[m]);
    begin_products();
    XATTN_UNROLL
    for (int i = 0; i < (S::kShared ? S::kGroups : 1); ++i) {
      const int group = S::kShared ? i : warpgroup();
      const uint64_t v = describe(values_of(group), kCore, kStride),
                     k = describe(keys_of(group) + column, kCore, kStride);
      XATTN_UNROLL
      for (int step = 0; step < kWideTokens / 16; ++step) {
        XATTN_UNROLL
        for (int m = 0; m < S::kRowTiles; ++m)
          multiply_wide<true, true>(s[m], v + static_cast<uint64_t>((m * 8 * kStride + step * 2 * kCore) / 16),
                                    k + static_cast<uint64_t>(step * 2 * kCore / 16), true);
      }
    }
    commit_products();
    wait_products<0>();
    XATTN_UNROLL
    for (int m = 0; m < S::kRowTiles; ++m) hold(s[m]);
  }

  // body(row, column, a float of this lane) for all of a warpgroup's sums.
  template <class Body>
  static XATTN_DEVICE void for_sums(const float (&s)[S::kRowTiles][S::kColumns / 2], const Body& body) {
    const int row = warp() % 4 * 16 + lane() / 4, column = 2 * (lane() % 4);
    XATTN_UNROLL
    for (int m = 0; m < S::kRowTiles; ++m) {
      XATTN_UNROLL
      for (int i = 0; i < S::kColumns / 2; ++i) body(64 * m + row + i / 2 % 2 * 8, column + i / 4 * 8 + i % 2, s[m][i]);
    }
  }

  // To the chunk's partial sum: rows of S, then Z.
  XATTN_DEVICE void finish(const float (&s)[S::kRowTiles][S::kColumns / 2], int work) const {
    const int channels = args_.channels;
    float* to = args_.partial + int64_t(work) * (channels + 1) * channels;
    if constexpr (S::kShared) {
      const int first = warpgroup() * S::kColumns;
      for_sums(s, [&](int row, int column, float x) {
        if (row <= channels && first + column < channels) to[row * channels + first + column] = x;
      });
    } else {
      float* sums = reinterpret_cast<float*>(x_of(0, 0));
      XATTN_KEEP_LOOP
      for (int turn = 0; turn < S::kGroups; ++turn) {
        sync_threads();
        if (warpgroup() == turn)
          for_sums(s, [&](int row, int column, float x) {
            float& sum = sums[row * S::kColumns + column];
            sum = turn == 0 ? x : sum + x;
          });
      }
      sync_threads();
      for_rows(channels + 1, channels,
               [&](int row, int column) { to[row * channels + column] = sums[row * S::kColumns + column]; });
      sync_threads();
    }
  }

  const Arguments& args_;
  int batch_ = 0, pair_ = 0, begin_ = 0, end_ = 0;
};

template <class S>
XATTN_KERNEL(S::kThreads, S::kBlocks)
source_kernel(XATTN_PARAMETER Arguments args) {
  Block<S>(args).run();
}

// Calls body with the shape for a width; false if there is none.
template <class Body>
bool with_shape(int64_t channels, const Body& body) {
  switch ((channels + 7) / 8 * 8) {
    case 40:
      body(Shape<40, 1, 1, 2, 2>{});
      return true;
    case 48:
      body(Shape<48, 1, 1, 2, 2>{});
      return true;
    case 72:
      body(Shape<72, 1, 2, 2, 1>{});
      return true;
    case 96:
      body(Shape<96, 1, 2, 2, 1>{});
      return true;
    case 144:
      body(Shape<72, 2, 3, 2, 1>{});
      return true;
    default:
      return false;
  }
}

}  // namespace

int64_t chunk_of_sources_sm90(const BlockSources& sources, const Limits& device) {
  int64_t chunk = 0;
  with_shape(sources.channels, [&](auto shape) {
    using S = decltype(shape);
    if (S::kBytes <= device.shared_bytes)
      chunk = choose_tokens(sources.longest, sources.count * sources.batch, S::kTokens, device.processors * S::kBlocks);
  });
  return chunk;
}

void start_sources_sm90(const BlockSources& sources, const Table& table, const Chunks& chunks, float* partial,
                        Stream stream) {
  const Arguments args{table,
                       sources.packed,
                       partial,
                       chunks.total * chunks.batch,
                       static_cast<int>(chunks.batch),
                       static_cast<int>(chunks.channels),
                       static_cast<int>(chunks.size),
                       sources.features,
                       sources.pairs,
                       chunks.table};
  with_shape(chunks.channels, [&](auto shape) {
    using S = decltype(shape);
    launch(source_kernel<S>, "block_sources_sm90", args.works, S::kThreads, S::kBytes, stream, args);
  });
}

}  // namespace xattn::cuda
#endif
