// S = sum_n w_n v_n phi(k_n)^T and Z = sum_n u_n w_n phi(k_n) over chunks of tokens.
//
// Plan: a block has a chunk of one slot and a piece of its state, kept in registers as the chunk's tokens
// go by in tiles, two of them in flight. Z is one row more of S: that of a value which is u_n. Warps share
// a piece by rows, columns and tokens; those with the same rows and columns add up at the end, in order.
// Features of bfloat16 are mapped where a warp has them as an operand, in registers: tiles in shared memory
// stay as they came. Other features are mapped there.
#include "linear_states.h"
#include "maths.h"
#include "tile.h"

namespace xattn::cuda {
namespace {

constexpr int kPiece = 48;  // rows and columns that a warp sums

struct Arguments {
  Table table;
  LinearStates problem;
  int64_t chunk, per_slot, slots, works;
  int first;
  float* partial;
};

// Warps by rows, columns and tokens of a tile; a warp takes 16 tokens kSteps times. kBlocks: of a processor.
template <class Products, int kRowWarps, int kColumnWarps, int kTokenWarps, int kSteps, int kBlocks>
struct Plan {
  using P = Products;
  static constexpr bool kMapped = sizeof(typename P::Element) == 2;  // in registers
  static constexpr int kResident = kBlocks;
  static constexpr int kThreads = kWarp * kRowWarps * kColumnWarps * kTokenWarps;
  static constexpr int kRows = kPiece * kRowWarps, kColumns = kPiece * kColumnWarps, kTokensOfWarp = 16 * kSteps,
                       kTokens = kTokensOfWarp * kTokenWarps;
  static constexpr int kKeys = tile_elements<P>(kColumns, kTokens), kValues = tile_elements<P>(kRows, kTokens);
  static constexpr int kTiles = (kKeys + kValues) * static_cast<int>(sizeof(typename P::Element));
  static constexpr int kStage = kTiles + 2 * kTokens * static_cast<int>(sizeof(float));  // and w, u
  static constexpr int kSums = kRows * kColumns * static_cast<int>(sizeof(float));
  static constexpr int kShared = 2 * kStage > kSums ? 2 * kStage : kSums;
  static_assert(kStage % 16 == 0, "stages begin at multiples of 16 bytes");
};

template <class Plan>
XATTN_DEVICE int groups_of_rows(const LinearStates& problem) {
  return static_cast<int>((problem.value_channels + Plan::kRows) / Plan::kRows);
}

template <class Plan>
class Block {
 public:
  using P = typename Plan::P;
  using E = typename P::Element;

  XATTN_DEVICE Block(const Arguments& args, int64_t work) : args_(args), problem_(args.problem) {
    const int row_groups = groups_of_rows<Plan>(problem_);
    const int column_groups = static_cast<int>((problem_.channels + Plan::kColumns - 1) / Plan::kColumns);
    const int group = static_cast<int>(work % (row_groups * column_groups));
    work /= row_groups * column_groups;
    // Slots next to each other: several of them may have the same keys.
    slot_ = work % args.slots;
    work /= args.slots;
    const int64_t chunk = work % args.per_slot;
    batch_ = work / args.per_slot;
    key_ = args.table.view(problem_.keys, slot_);
    value_ = args.table.view(problem_.values, slot_);
    begin_ = chunk * args.chunk;
    end_ = min(key_.tokens, begin_ + args.chunk);
    row_ = group % row_groups * Plan::kRows;
    column_ = group / row_groups * Plan::kColumns;
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_ || value_.data == nullptr) return;
    rows_ = within(problem_.value_channels + 1 - row_, Plan::kRows);
    columns_ = within(problem_.channels - column_, Plan::kColumns);
    key_access_ = access<E>(key_, problem_.dtype);
    value_access_ = access<E>(value_, problem_.dtype);
    sum_.clear();
    sum_tokens();
    add_up();
  }

 private:
  static XATTN_DEVICE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
  static XATTN_DEVICE int within(int64_t left, int most) { return static_cast<int>(min(left, most)); }
  static XATTN_DEVICE int padded(int width) { return (width + 15) / 16 * 16; }

  XATTN_DEVICE E* stage(int number) const { return reinterpret_cast<E*>(shared_memory() + number % 2 * Plan::kStage); }
  XATTN_DEVICE Tile<E> keys(int number) const {
    return make_tile<P>(stage(number), key_access_.token_minor, Plan::kColumns, Plan::kTokens);
  }
  XATTN_DEVICE Tile<E> values(int number) const {
    return make_tile<P>(stage(number) + Plan::kKeys, value_access_.token_minor, Plan::kRows, Plan::kTokens);
  }

  // w and u of a tile's tokens.
  XATTN_DEVICE float* weights(int number) const {
    return reinterpret_cast<float*>(shared_memory() + number % 2 * Plan::kStage + Plan::kTiles);
  }

  XATTN_DEVICE void load(int number) const {
    const int64_t token = begin_ + number * Plan::kTokens;
    if (token < end_) {
      const int tokens = within(end_ - token, Plan::kTokens);
      if (problem_.weights != nullptr) {
        const float* from = problem_.weights + (slot_ * problem_.batch + batch_) * 2 * problem_.longest + token;
        for (int i = thread_index(); i < 2 * Plan::kTokens; i += Plan::kThreads) {
          const int which = i / Plan::kTokens, n = i % Plan::kTokens;
          copy_async<4>(weights(number) + i, from + which * problem_.longest + (n < tokens ? n : 0),
                        n < tokens ? 4 : 0);
        }
      }
      load_tile(key_, key_access_, {batch_, column_, token, columns_, tokens}, keys(number), padded(columns_),
                Plan::kTokens);
      const int rows = within(problem_.value_channels - row_, Plan::kRows);
      load_tile(value_, value_access_, {batch_, row_, token, rows, tokens}, values(number), padded(rows_),
                Plan::kTokens);
    }
    commit_copies();
  }

  // Row of values, in this piece, that makes Z; the value of a token there.
  XATTN_DEVICE int last() const { return static_cast<int>(problem_.value_channels - row_); }
  XATTN_DEVICE float value_of_z(int number, int n) const {
    if (problem_.weights != nullptr) return weights(number)[Plan::kTokens + n];
    return begin_ + number * Plan::kTokens + n < end_ ? 1.0f : 0.0f;
  }

  // What keys beyond the tensor are mapped to does no harm: values of such tokens are zero, that of Z as well,
  // and columns of such channels go nowhere.
  //
  // w phi(k) and the row of Z in shared memory.
  XATTN_DEVICE void prepare(int number) const {
    const FeatureMap name = problem_.feature_map;
    const float* w = problem_.weights != nullptr ? weights(number) : nullptr;
    map_tile(keys(number), padded(columns_), Plan::kTokens, [=](float x, int, int n) {
      const float y = feature_map<P::kExact>(name, x);
      return w != nullptr ? y * w[n] : y;
    });
    if (last() < Plan::kRows)
      for (int n = thread_index(); n < Plan::kTokens; n += Plan::kThreads)
        *values(number).at(last(), n) = from_float<E>(value_of_z(number, n));
  }

  // The product of 16 tokens of a tile with operands mapped in registers.
  XATTN_DEVICE void multiply_mapped(int number, int first) {
    const int g = lane() / 4, t = lane() % 4, matrix = lane() / 8, r = lane() % 8;
    const Operand<E> k = keys(number).over_tokens(), v = values(number).over_tokens();
    const FeatureMap name = problem_.feature_map;
    const bool weighted = problem_.weights != nullptr;
    // Of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
    float w[4];
    XATTN_UNROLL
    for (int i = 0; i < 4; ++i) w[i] = weighted ? weights(number)[first + 2 * t + i % 2 + i / 2 * 8] : 1.0f;
    uint32_t right[kPiece / 16][4];
    XATTN_UNROLL
    for (int n = 0; n < kPiece / 16; ++n) {
      const int i = column_of_warp() + 16 * n;
      if (i >= columns_) continue;
      if (k.depth_minor)
        load_matrices(right[n], k.at(i + matrix / 2 * 8 + r, first + matrix % 2 * 8));
      else
        load_matrices_transposed(right[n], k.at(i + matrix / 2 * 8, first + matrix % 2 * 8 + r));
      XATTN_UNROLL
      for (int j = 0; j < 4; ++j) {
        if (i + j / 2 * 8 >= columns_) continue;
        const float x = feature_map<P::kExact>(name, bfloat16_to_float(static_cast<uint16_t>(right[n][j])));
        const float y = feature_map<P::kExact>(name, bfloat16_to_float(static_cast<uint16_t>(right[n][j] >> 16)));
        right[n][j] = weighted ? pack_bfloat16(x * w[j % 2 * 2], y * w[j % 2 * 2 + 1]) : pack_bfloat16(x, y);
      }
    }
    const int row = row_of_warp(), z = last() - row;
    XATTN_UNROLL
    for (int m = 0; m < kPiece / 16; ++m) {
      if (row + 16 * m >= rows_) continue;
      uint32_t left[4];
      if (v.depth_minor)
        load_matrices(left, v.at(row + 16 * m + matrix % 2 * 8 + r, first + matrix / 2 * 8));
      else
        load_matrices_transposed(left, v.at(row + 16 * m + matrix % 2 * 8, first + matrix / 2 * 8 + r));
      XATTN_UNROLL
      for (int j = 0; j < 4; ++j)
        if (z == 16 * m + j % 2 * 8 + g) {
          const int n = first + 2 * t + j / 2 * 8;
          left[j] = pack_bfloat16(value_of_z(number, n), value_of_z(number, n + 1));
        }
      XATTN_UNROLL
      for (int n = 0; n < kPiece / 16; ++n) {
        if (column_of_warp() + 16 * n >= columns_) continue;
        multiply_bfloat16(sum_.v[m][2 * n], left, {right[n][0], right[n][1]});
        multiply_bfloat16(sum_.v[m][2 * n + 1], left, {right[n][2], right[n][3]});
      }
    }
  }

  XATTN_DEVICE void sum_tokens() {
    load(0);
    XATTN_KEEP_LOOP
    for (int number = 0; begin_ + number * Plan::kTokens < end_; ++number) {
      load(number + 1);
      wait_copies<1>();
      sync_threads();
      if constexpr (Plan::kMapped) {
        XATTN_KEEP_LOOP
        for (int n = 0; n < Plan::kTokensOfWarp; n += 16) multiply_mapped(number, token_of_warp() + n);
      } else {
        prepare(number);
        sync_threads();
        multiply_add<P>(sum_, values(number).over_tokens(), row_of_warp(), keys(number).over_tokens(), column_of_warp(),
                        token_of_warp(), token_of_warp() + Plan::kTokensOfWarp, padded(rows_) - row_of_warp(),
                        padded(columns_) - column_of_warp());
      }
      sync_threads();
    }
  }

  // Warps of the same piece one after another, then all of it to global memory.
  XATTN_DEVICE void add_up() {
    float* sums = reinterpret_cast<float*>(shared_memory());
    const int rows = rows_ - row_of_warp(), columns = columns_ - column_of_warp();
    XATTN_KEEP_LOOP
    for (int turn = 0; turn < kTokenWarps; ++turn) {
      if (token_warp() == turn)
        sum_.for_pairs(rows, columns, [&](int row, int column, float x, float y) {
          float* to = sums + (row_of_warp() + row) * Plan::kColumns + column_of_warp() + column;
          to[0] = turn == 0 ? x : to[0] + x;
          to[1] = turn == 0 ? y : to[1] + y;
        });
      sync_threads();
    }
    const int64_t chunk = args_.table[args_.first + slot_] + begin_ / args_.chunk;
    float* partial =
        args_.partial + (chunk * problem_.batch + batch_) * (problem_.value_channels + 1) * problem_.channels;
    for_rows(rows_, columns_, [&](int row, int column) {
      partial[(row_ + row) * problem_.channels + column_ + column] = sums[row * Plan::kColumns + column];
    });
    sync_threads();
  }

  static constexpr int kRowWarps = Plan::kRows / kPiece, kColumnWarps = Plan::kColumns / kPiece,
                       kTokenWarps = Plan::kTokens / Plan::kTokensOfWarp;
  static XATTN_DEVICE int row_of_warp() { return warp() % kRowWarps * kPiece; }
  static XATTN_DEVICE int column_of_warp() { return warp() / kRowWarps % kColumnWarps * kPiece; }
  static XATTN_DEVICE int token_of_warp() { return token_warp() * Plan::kTokensOfWarp; }
  static XATTN_DEVICE int token_warp() { return warp() / kRowWarps / kColumnWarps; }

  const Arguments& args_;
  const LinearStates& problem_;
  View key_, value_;
  Access key_access_, value_access_;
  int64_t slot_, batch_, begin_, end_, row_, column_;
  int rows_, columns_;
  Accumulator<kPiece / 16, kPiece / 8> sum_;
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kResident)
state_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<Plan>(args, work).run();
}

template <class Plan>
void start_plan(Arguments args, const Chunks& chunks, Stream stream) {
  const int64_t rows = (args.problem.value_channels + Plan::kRows) / Plan::kRows;
  const int64_t columns = (args.problem.channels + Plan::kColumns - 1) / Plan::kColumns;
  args.works = rows * columns * chunks.per_slot * chunks.batch * chunks.slots;
  launch(state_kernel<Plan>, "linear_states", args.works, Plan::kThreads, Plan::kShared, stream, args);
}

}  // namespace

int64_t linear_chunk(const LinearProblem& problem, int64_t slots, int64_t longest) {
  const int64_t pieces = (problem.value_channels / kPiece + 1) * ((problem.channels + kPiece - 1) / kPiece);
  return chunk_tokens(longest, slots * problem.batch * pieces, 128, limits().processors);
}

void start_linear_states(const LinearStates& problem, const Table& table, const Chunks& chunks, float* partial,
                         Stream stream) {
  const Arguments args{table, problem, chunks.size, chunks.per_slot, chunks.slots, 0, chunks.table, partial};
  const bool narrow = problem.channels <= kPiece && problem.value_channels < kPiece;
  if (problem.dtype == Dtype::kBFloat16) {
    if (narrow)
      start_plan<Plan<BFloat16Products, 1, 1, 4, 1, 3>>(args, chunks, stream);
    else
      start_plan<Plan<BFloat16Products, 2, 2, 2, 2, 1>>(args, chunks, stream);
  } else if (problem.dtype == Dtype::kFloat16 || problem.tf32) {
    start_plan<Plan<Tf32Products, 1, 1, 4, 1, 1>>(args, chunks, stream);
  } else {
    start_plan<Plan<IeeeProducts, 1, 1, 4, 1, 1>>(args, chunks, stream);
  }
}

}  // namespace xattn::cuda
