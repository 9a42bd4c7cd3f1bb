// Sources of the cross-attention block in bfloat16: sums S = sum_n v_n k_n^T, Z = sum_n k_n of chunks of tokens.
//
//   h = relu(W_k1 x + b)    k = softplus(W_k2 h + b)    v = relu(W_v x + b)
//
// Plan: a block has a chunk of tokens of a pair of source and weights, and the pair's three matrices in shared
// memory. A warp takes 32 tokens at a time, the next ones on their way, and projects them in registers
// (block_chain.h); products with tokens as columns are, once packed, the operands of S. Up to 48 channels a warp
// keeps S of its own, and there is no barrier but around a chunk. Up to 96, keys and values go through shared memory
// as fragments, and warps divide S by rows, columns and tokens. Z is one row more of S where there is room in its
// last tile: that of a value which is one.
#include "block.h"
#include "block_stream.h"

namespace xattn::cuda {
namespace {

constexpr uint32_t kOnes = 0x3F803F80;

struct Arguments {
  Table table;
  PackedBlock packed;
  int64_t batch, pairs, channels, chunk, per_slot, works;
  int features, list, first, slabs;
  float* partial;
};

template <int kSize>
struct alignas(4 * kSize) Words {
  uint32_t v[kSize];
};

// Warps by rows, columns and tokens of S; kShare: whether they exchange keys and values.
template <int kWidth, int kFrom, int kWarps_, int kResident_, bool kShare_, int kRowGroups_, int kColumnGroups_>
struct Plan {
  using S = Shape<kWidth, kFrom, 32, Loops::kWhole>;
  static constexpr int kWarps = kWarps_, kResident = kResident_, kThreads = kWarp * kWarps;
  static constexpr bool kShare = kShare_;
  static constexpr int kRowGroups = kRowGroups_, kColumnGroups = kColumnGroups_;
  static constexpr int kRows = (S::kTiles + kRowGroups - 1) / kRowGroups;
  static constexpr int kColumns = (S::kHalves + kColumnGroups - 1) / kColumnGroups;
  static constexpr int kTile = kWarps * S::kTokens;
  // Bytes: matrices, biases, where features are, features of a warp, keys and values of a warp; sums, where features
  // were.
  static constexpr int kMatrix = S::kPadded * S::kPadded * 2;
  static constexpr int kBiases = 3 * kMatrix, kRun = kBiases + 3 * S::kPadded * 4, kSlabs = kRun + kTokensBytes;
  static constexpr int kSlab = Slab<S::kTokens>::bytes(S::kWidth);
  static constexpr int kValueWords = S::kBlocks * S::kTiles * 128, kKeyWords = S::kBlocks * S::kHalves * 64;
  static constexpr int kExchange = kShare ? 4 * (kValueWords + kKeyWords) : 0;
  static constexpr int kSumRow = 8 * S::kHalves, kSums = (16 * S::kTiles + 1) * kSumRow * 4;
  static constexpr int bytes(int slabs) {
    const int parts = kWarps * (slabs * kSlab + kExchange);
    return kSlabs + (parts > kSums ? parts : kSums);
  }
  static_assert(kSlabs % 16 == 0 && kSlab % 16 == 0, "rows of operands begin at multiples of 16 bytes");
};

template <class Plan>
class Block {
 public:
  using S = typename Plan::S;
  static constexpr int kTokens = S::kTokens;

  XATTN_DEVICE Block(const Arguments& args, int work) : args_(args) {
    const Work place = place_of(work);
    const View x = view(place);
    const int64_t begin = place.chunk * args.chunk, left = x.tokens - begin;
    const int count = static_cast<int>(left < args.chunk ? left : args.chunk);
    empty_ = count <= 0;
    if (thread_index() == 0) {
      tokens_of_chunk() = {run_of(x, place.batch, begin), count};
      work_of_block() = work;
    }
  }

  // Returns what this block does next.
  XATTN_DEVICE int sum() {
    sync_threads();
    if (!empty_) sum_chunk();
    const int next = work_of_block() + block_count();
    sync_threads();
    return next;
  }

 private:
  XATTN_DEVICE void sum_chunk() {
    load_weights();
    clear();
    XATTN_KEEP_LOOP
    for (int number = 0; number < slabs(); ++number) {
      load(number);
      commit_copies();
    }
    wait_copies<0>();
    sync_threads();
    // Of warps that share nothing, each ends with its last token.
    XATTN_KEEP_LOOP
    for (int number = 0; number * Plan::kTile < tokens_of_chunk().count; ++number) {
      if (!Plan::kShare && token(number) >= tokens_of_chunk().count) break;
      if (slabs() == 2)
        wait_copies<1>();
      else
        wait_copies<0>();
      sync_warp();
      project_tile(slab(number), tokens(number));
      sync_warp();
      load(number + slabs());
      commit_copies();
      if (Plan::kShare) {
        sync_threads();
        add_shared();
        sync_threads();
      }
    }
    wait_copies<0>();
    sync_threads();
    add_up();
  }

  // A work as its pair of source and weights, chunk and sample. Computed again where it is wanted, rather than kept.
  struct Work {
    int pair, chunk, batch;
  };
  XATTN_DEVICE Work place_of(int work) const {
    const int pairs = static_cast<int>(args_.pairs), per_slot = static_cast<int>(args_.per_slot);
    return {work % pairs, work / pairs % per_slot, work / pairs / per_slot};
  }
  XATTN_DEVICE Work place() const { return place_of(work_of_block()); }
  XATTN_DEVICE View view(const Work& place) const {
    return args_.table.view(args_.features, args_.table[args_.list + 2 * place.pair]);
  }
  XATTN_DEVICE Whole whole() const {
    const Work now = place();
    return {view(now), now.batch, now.chunk * args_.chunk};
  }

  XATTN_DEVICE Channels channels() const { return {static_cast<int>(args_.channels), S::kPadded}; }
  // In shared memory: registers are for what products need.
  static XATTN_DEVICE int& work_of_block() { return *reinterpret_cast<int*>(&tokens_of_chunk() + 1); }
  static XATTN_DEVICE Tokens& tokens_of_chunk() { return *reinterpret_cast<Tokens*>(shared_memory() + Plan::kRun); }
  XATTN_DEVICE int token(int number) const { return (number * Plan::kWarps + opaque(warp())) * kTokens; }
  XATTN_DEVICE int tokens(int number) const {
    const int left = tokens_of_chunk().count - token(number);
    return left > kTokens ? kTokens : left > 0 ? left : 0;
  }
  XATTN_DEVICE int slabs() const { return Plan::kShare ? args_.slabs : 2; }
  XATTN_DEVICE Slab<kTokens> slab(int number) const {
    const int place =
        Plan::kSlabs + opaque(warp()) * Plan::kSlab + (slabs() == 2 ? number % 2 * (Plan::kWarps * Plan::kSlab) : 0);
    return Slab<kTokens>::make(shared_memory() + place, S::kWidth, tokens_of_chunk().run.token_minor);
  }
  XATTN_DEVICE const BFloat16* rows(int matrix, int tile) const {
    return reinterpret_cast<const BFloat16*>(shared_memory()) + (matrix * S::kPadded + 16 * tile) * S::kPadded;
  }
  XATTN_DEVICE const float* bias(int matrix) const {
    return reinterpret_cast<const float*>(shared_memory() + Plan::kBiases) + matrix * S::kPadded;
  }
  // Fragments of a warp: values by block of tokens and tile of channels, keys by block and half a tile.
  XATTN_DEVICE Words<4>* values(int warp, int i, int m) const {
    char* base = shared_memory() + Plan::kSlabs + slabs() * Plan::kWarps * Plan::kSlab + warp * Plan::kExchange;
    return reinterpret_cast<Words<4>*>(base) + (i * S::kTiles + m) * kWarp + lane();
  }
  XATTN_DEVICE Words<2>* keys(int warp, int i, int n) const {
    return reinterpret_cast<Words<2>*>(values(warp, 0, 0) - lane() + Plan::kValueWords / 4) +
           (i * S::kHalves + n) * kWarp + lane();
  }

  XATTN_DEVICE void load_weights() const {
    const int64_t set = args_.table[args_.list + 2 * place().pair + 1] * kProjections + kKey1;
    copy_projections<S>(shared_memory(), reinterpret_cast<float*>(shared_memory() + Plan::kBiases), args_.packed, set,
                        3, static_cast<int>(padded_channels(args_.channels)));
  }

  XATTN_DEVICE void load(int number) const {
    load_part<S::kWidth>(
        tokens_of_chunk().run, [this] { return whole(); }, {token(number), 0, channels().count, tokens(number)},
        S::kWidth, slab(number));
  }

  XATTN_DEVICE void clear() {
    XATTN_UNROLL
    for (int m = 0; m < Plan::kRows; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < Plan::kColumns; ++n) {
        XATTN_UNROLL
        for (int e = 0; e < 4; ++e) sum_[m][n][e] = 0.0f;
      }
    }
    XATTN_UNROLL
    for (int m = 0; m < S::kTiles; ++m) z_[m][0] = z_[m][1] = 0.0f;
  }

  XATTN_DEVICE void project_tile(const Slab<kTokens>& slab, int count) {
    Fragments<S> h;
    {
      Fragments<S> x;
      load_fragments<Order::kLeft>(slab, channels(), x);
      project<Activation::kRelu>(x, bias(0), channels(), [&](int j) { return rows(0, j); }, h);
    }
    uint32_t key[S::kBlocks][S::kHalves][2];
    XATTN_UNROLL
    for (int m = 0; m < S::kTiles; ++m) make_keys(h, m, count, key);
    // Read again, which is cheaper than to keep features and to copy them to where values want them.
    Fragments<S> x;
    load_fragments<Order::kRight>(slab, channels(), x);
    // Tokens beyond the last one must not count. With biases folded, they have values of zero, and no one for Z:
    // that is a value of all others. Else their keys have been made zero.
    if constexpr (S::kFolded) {
      XATTN_UNROLL
      for (int i = 0; i < S::kBlocks; ++i) {
        XATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          if (16 * i + 8 * half + lane() / 4 >= count) x.v[i][S::kTiles - 1][2 * half + 1] = 0;
        }
      }
    }
    XATTN_UNROLL
    for (int m = 0; m < S::kTiles; ++m) make_values(x, m, count, key);
  }

  // k of 16 channels.
  XATTN_DEVICE void make_keys(const Fragments<S>& h, int m, int count, uint32_t (&key)[S::kBlocks][S::kHalves][2]) {
    const int t = lane() % 4;
    Sums<S> sums;
    begin_with<true>(sums, bias(1) + 16 * m);
    multiply<true, Order::kLeft, false>(sums, h, rows(1, m) + weight_offset<true>(S::kPadded), channels());
    XATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int n = 2 * m + r;
      if (n >= S::kHalves) continue;
      XATTN_UNROLL
      for (int i = 0; i < S::kBlocks; ++i) {
        XATTN_UNROLL
        for (int half = 0; half < 2; ++half) {
          float low = softplus_bfloat16(sums.v[i][half][2 * r]), high = softplus_bfloat16(sums.v[i][half][2 * r + 1]);
          if (!S::kFolded && count < kTokens) {
            if (16 * i + 8 * half + 2 * t >= count) low = 0.0f;
            if (16 * i + 8 * half + 2 * t + 1 >= count) high = 0.0f;
          }
          if (!S::kFolded) z_[m][r] += low + high;
          key[i][n][half] = pack_bfloat16(low, high);
        }
        if constexpr (Plan::kShare) *keys(opaque(warp()), i, n) = {{key[i][n][0], key[i][n][1]}};
      }
    }
  }

  // v of 16 channels; as it is one operand of S, the product as well unless others compute it.
  XATTN_DEVICE void make_values(const Fragments<S>& x, int m, int count,
                                const uint32_t (&key)[S::kBlocks][S::kHalves][2]) {
    Sums<S> sums;
    begin_with<true>(sums, bias(2) + 16 * m);
    multiply<true, Order::kRight, false>(sums, x, rows(2, m) + weight_offset<true>(S::kPadded), channels());
    XATTN_UNROLL
    for (int i = 0; i < S::kBlocks; ++i) {
      uint32_t value[4];
      XATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        XATTN_UNROLL
        for (int r = 0; r < 2; ++r) {
          uint32_t& pair = value[2 * half + r];
          pair = pack_bfloat16_relu(sums.v[i][half][2 * r], sums.v[i][half][2 * r + 1]);
          if (S::kFolded && 16 * m + 8 * r + 8 > S::kFrom && 16 * m + 8 * r + lane() / 4 == channels().count) {
            const int left = count - (16 * i + 8 * half + 2 * (lane() % 4));
            pair = left > 1 ? kOnes : left > 0 ? kOnes & 0xFFFFu : 0u;
          }
        }
      }
      if constexpr (Plan::kShare) {
        *values(opaque(warp()), i, m) = {{value[0], value[1], value[2], value[3]}};
      } else {
        XATTN_UNROLL
        for (int n = 0; n < S::kHalves; ++n) multiply_bfloat16(sum_[m][n], value, key[i][n]);
      }
    }
  }

  // Which part of S a warp has. Every other group of warps counts from the end: of parts that are not of one size,
  // a large and a small one then meet on the same quarter of a processor.
  static XATTN_DEVICE int part() {
    constexpr int kParts = Plan::kRowGroups * Plan::kColumnGroups;
    const int number = opaque(warp()) % kParts;
    return opaque(warp()) / kParts % 2 == 0 ? number : kParts - 1 - number;
  }
  static XATTN_DEVICE int first_row() { return Plan::kShare ? part() % Plan::kRowGroups * Plan::kRows : 0; }
  static XATTN_DEVICE int first_column() { return Plan::kShare ? part() / Plan::kRowGroups * Plan::kColumns : 0; }
  static XATTN_DEVICE int token_group() {
    return Plan::kShare ? opaque(warp()) / (Plan::kRowGroups * Plan::kColumnGroups) : warp();
  }

  // This warp's rows and columns of S, of the tokens of its group of warps.
  XATTN_DEVICE void add_shared() {
    constexpr int kPer = Plan::kRowGroups * Plan::kColumnGroups;  // warps of a group
    const int row = first_row(), column = first_column(), group = token_group();
    XATTN_KEEP_LOOP
    for (int j = 0; j < kPer * S::kBlocks; ++j) {
      const int from = group * kPer + j / S::kBlocks, i = j % S::kBlocks;
      uint32_t key[Plan::kColumns][2];
      XATTN_UNROLL
      for (int n = 0; n < Plan::kColumns; ++n) {
        if (column + n >= S::kHalves) continue;
        const Words<2> words = *keys(from, i, column + n);
        key[n][0] = words.v[0];
        key[n][1] = words.v[1];
      }
      XATTN_UNROLL
      for (int m = 0; m < Plan::kRows; ++m) {
        if (row + m >= S::kTiles) continue;
        const Words<4> value = *values(from, i, row + m);
        XATTN_UNROLL
        for (int n = 0; n < Plan::kColumns; ++n) {
          if (column + n >= S::kHalves) continue;
          multiply_bfloat16(sum_[m][n], value.v, key[n]);
        }
      }
    }
  }

  // Sums of warps one after another, then all of it to global memory.
  XATTN_DEVICE void add_up() {
    float* sums = reinterpret_cast<float*>(shared_memory() + Plan::kSlabs);
    const int g = lane() / 4, t = lane() % 4;
    const int z_row = S::kFolded ? channels().count : 16 * S::kTiles;
    XATTN_KEEP_LOOP
    for (int turn = 0; turn < Plan::kWarps; ++turn) {
      if (token_group() == turn) add_sums(sums, turn == 0);
      if (!S::kFolded && warp() == turn) {
        XATTN_UNROLL
        for (int m = 0; m < S::kTiles; ++m) {
          XATTN_UNROLL
          for (int r = 0; r < 2; ++r) {
            float z = z_[m][r];
            z += shuffle_xor(z, 1);
            z += shuffle_xor(z, 2);
            float& to = sums[z_row * Plan::kSumRow + 16 * m + 8 * r + g];
            if (t == 0) to = turn == 0 ? z : to + z;
          }
        }
      }
      sync_threads();
    }
    const int count = channels().count;
    const Work now = place();
    const int64_t number = (args_.table[args_.first + now.pair] + now.chunk) * args_.batch + now.batch;
    float* to = args_.partial + number * (args_.channels + 1) * args_.channels;
    for_rows(count + 1, count, [&](int row, int column) {
      to[row * count + column] = sums[(row < count ? row : z_row) * Plan::kSumRow + column];
    });
  }

  XATTN_DEVICE void add_sums(float* sums, bool first) const {
    const int g = lane() / 4, t = lane() % 4, first_m = first_row(), first_n = first_column();
    XATTN_UNROLL
    for (int m = 0; m < Plan::kRows; ++m) {
      if (first_m + m >= S::kTiles) continue;
      XATTN_UNROLL
      for (int n = 0; n < Plan::kColumns; ++n) {
        if (first_n + n >= S::kHalves) continue;
        XATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int row = 16 * (first_m + m) + g + e / 2 * 8, column = 8 * (first_n + n) + 2 * t + e % 2;
          float& to = sums[row * Plan::kSumRow + column];
          to = first ? sum_[m][n][e] : to + sum_[m][n][e];
        }
      }
    }
  }

  const Arguments& args_;
  bool empty_;
  float sum_[Plan::kRows][Plan::kColumns][4];
  float z_[S::kTiles][2];
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kResident)
source_kernel(XATTN_PARAMETER Arguments args) {
  int work = block_index();
  XATTN_KEEP_LOOP
  while (work < args.works) work = Block<Plan>(args, work).sum();
}

struct Kernel {
  int width, threads, tile, overhead;
  int (*bytes)(int slabs);
  void (*start)(Arguments);
};
template <class Plan>
constexpr Kernel kernel_of() {
  return {Plan::S::kWidth, Plan::kThreads, Plan::kTile, Plan::kShare ? 80 : 150, Plan::bytes, source_kernel<Plan>};
}

// The narrowest that is wide enough, with two tiles of tokens on their way or one: none where none fits this device.
struct Choice {
  const Kernel* kernel;
  int slabs;
  size_t shared;
};
Choice choose(int64_t channels) {
  static const Kernel kKernels[] = {
      kernel_of<Plan<24, 1, 4, 3, false, 1, 1>>(),  kernel_of<Plan<40, 25, 4, 3, false, 1, 1>>(),
      kernel_of<Plan<48, 41, 4, 2, false, 1, 1>>(), kernel_of<Plan<72, 49, 8, 1, true, 2, 2>>(),
      kernel_of<Plan<96, 73, 8, 1, true, 2, 4>>(),
  };
  for (const Kernel& kernel : kKernels) {
    if (kernel.width < channels) continue;
    for (int slabs = 2; slabs > 0; --slabs)
      if (kernel.bytes(slabs) <= limits().shared_bytes)
        return {&kernel, slabs, static_cast<size_t>(kernel.bytes(slabs))};
    break;
  }
  return {};
}

constexpr const char* kName = "block_sources";

}  // namespace

int64_t chunk_of_sources(const BlockSources& sources) {
  if (sources.dtype != Dtype::kBFloat16) return 0;
  const Choice choice = choose(sources.channels);
  if (choice.kernel == nullptr) return 0;
  const int64_t resident = resident_blocks(reinterpret_cast<const void*>(choice.kernel->start), kName,
                                           choice.kernel->threads, choice.shared);
  return choose_tokens(sources.longest, sources.count * sources.batch, choice.kernel->tile, resident,
                       choice.kernel->overhead);
}

void start_sources(const BlockSources& sources, const Table& table, const Chunks& chunks, float* partial,
                   Stream stream) {
  const Choice choice = choose(sources.channels);
  const Arguments args{table,
                       sources.packed,
                       sources.batch,
                       sources.count,
                       sources.channels,
                       chunks.size,
                       chunks.per_slot,
                       checked_works(chunks.per_slot * sources.batch * sources.count, kName),
                       sources.features,
                       sources.pairs,
                       chunks.table,
                       choice.slabs,
                       partial};
  launch(choice.kernel->start, kName, args.works, choice.kernel->threads, choice.shared, stream, args);
}

}  // namespace xattn::cuda
