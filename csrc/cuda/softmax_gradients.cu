// Gradients of softmax cross-attention: dq of queries, dk and dv of sources; see softmax_bwd.cu for the equations.
//
// Plan: for dq a block has a tile of queries and goes through the keys and values of all sources of all outputs of
// that query; for dk and dv it has a tile of keys and values and goes through the queries and gradients of all
// outputs that read them. So every sum is made by one warp in one order. Both are one kernel: "own" is the side of
// a block, (q, g) or (k, v), "other" what it goes through, tile by tile, the next one on its way. A warp has 16 or
// 32 rows of its own side; p and ds are results of products and left operands of the next and stay in registers,
// as sums do.
//
// bfloat16 heads of usual widths have kernels of exactly these; all others have kernels that skip what a head
// does not have, sum products over chunks of channels where shared memory does not hold all of them, and make
// wide results in groups of channels, works of their own.
#include <algorithm>

#include "softmax_bwd.h"

namespace xattn::cuda {
namespace {

// kChannels: the padded width of a head, or 0. kFirst, kSecond: columns of results, of dq or dk and of dv, in a
// group; kSecond is 0 for dq. Four warps have 16 kRowTiles rows each, against kOthers tokens at a time.
template <class Products, int kChannelsOfPlan, int kFirstOfPlan, int kSecondOfPlan, int kRowTilesOfPlan,
          int kOthersOfPlan>
struct Plan {
  using P = Products;
  static constexpr int kChannels = kChannelsOfPlan, kFirst = kFirstOfPlan, kSecond = kSecondOfPlan,
                       kRowTiles = kRowTilesOfPlan, kOthers = kOthersOfPlan;
  static constexpr int kWarps = 4, kThreads = kWarp * kWarps, kTokens = 16 * kRowTiles * kWarps;
  static constexpr bool kWhole = kChannels > 0, kSources = kSecond > 0;
};

template <class Plan>
class Block {
 public:
  using P = typename Plan::P;
  using E = typename P::Element;
  static constexpr int kRowTiles = Plan::kRowTiles, kOthers = Plan::kOthers, kTokens = Plan::kTokens;
  using Scores = Accumulator<kRowTiles, kOthers / 8>;

  XATTN_DEVICE Block(const GradientArguments& args, uint32_t work) : args_(args), geometry_(args.geometry) {
    begin_ = static_cast<int64_t>(work % args.steps) * kTokens;
    work /= args.steps;
    Place place;
    place.column = static_cast<int>(work % args.groups) * geometry_.columns;
    work /= args.groups;
    place.head = work % args.heads;
    work /= args.heads;
    place.batch = work % args.batch;
    place.slot = work / args.batch;
    const View own = args.table.view(args.own[0], place.slot);
    tokens_ = least(own.tokens - begin_, kTokens);
    const auto columns = [&](int i) {
      const bool wanted = args.table[args.results[i] + 5 * place.slot] != 0;
      return wanted ? least(args.channels[i] - place.column, geometry_.columns) : 0;
    };
    first_columns_ = columns(0);
    second_columns_ = Plan::kSources ? columns(1) : 0;
    if (!working() || thread_index() != 0) return;
    control().place = place;
    set(control().own[0], own, 0);
    if (Plan::kSources) set(control().own[1], args.table.view(args.own[1], place.slot), 1);
  }

  XATTN_DEVICE void run() {
    if (!working()) return;
    first_.clear();
    if constexpr (Plan::kSources) second_.clear();
    sync_threads();
    const Place place = control().place;
    if constexpr (Plan::kSources) {
      go_through(place.slot);
    } else {
      const int last = static_cast<int>(args_.table[args_.outer + place.slot + 1]);
      XATTN_KEEP_LOOP
      for (int i = static_cast<int>(args_.table[args_.outer + place.slot]); i < last; ++i) {
        const int64_t output = args_.table[i];
        if (thread_index() == 0) set(control().own[1], args_.table.view(args_.own[1], output), 1);
        read_statistics(output);
        go_through(output);
      }
    }
    finish();
  }

 private:
  // In shared memory: which part of the problem this is; its own side; what is read of the other one now and next.
  struct Place {
    int64_t slot, batch, head;
    int column;
  };
  struct Control {
    Place place;
    Matrix<E> own[2], other[2][2];
    const Statistics* statistics[2];
  };
  static_assert(sizeof(Control) <= kControl, "room in shared memory");
  static XATTN_DEVICE Control& control() { return *reinterpret_cast<Control*>(shared_memory()); }

  // What is computed with a stage. Control may already have what comes next.
  struct Step {
    int chunk, tokens;
    bool own_first_minor, own_second_minor, first_minor, second_minor;
  };

  XATTN_DEVICE bool working() const { return tokens_ > 0 && (first_columns_ > 0 || second_columns_ > 0); }
  // Members that a number picks would not stay in registers.
  XATTN_DEVICE int columns(int i) const { return i == 0 ? first_columns_ : second_columns_; }
  XATTN_DEVICE void set(Matrix<E>& matrix, const View& view, int i) const {
    const Place& place = control().place;
    matrix.set(view, args_.dtype, place.batch, place.head * args_.channels[i]);
  }
  XATTN_DEVICE const Statistics* statistics(int64_t output) const {
    const Place& place = control().place;
    const int64_t tokens = args_.table[args_.statistics + 2 * output + 1];
    return args_.all_statistics + args_.table[args_.statistics + 2 * output] +
           (place.batch * args_.heads + place.head) * tokens;
  }

  static XATTN_DEVICE E* shared(int offset) { return reinterpret_cast<E*>(shared_memory() + kControl + offset); }
  XATTN_DEVICE int stage(int number) const {
    return geometry_.first + (number & (geometry_.stages - 1)) * geometry_.stage;
  }
  XATTN_DEVICE int chunk() const { return Plan::kWhole ? Plan::kChannels : geometry_.chunk; }
  XATTN_DEVICE bool resident() const { return Plan::kWhole || geometry_.chunks == 1; }

  XATTN_DEVICE Tile<E> own(int number, int i, bool token_minor) const {
    const int at = resident() ? 0 : stage(number) + geometry_.own_at;
    return make_tile<P>(shared(at + i * geometry_.own), token_minor, chunk(), kTokens);
  }
  XATTN_DEVICE Tile<E> other(int number, int i, bool token_minor) const {
    return make_tile<P>(shared(stage(number) + i * geometry_.second), token_minor, chunk(), kOthers);
  }
  // What results are sums of, and the column of a group there.
  XATTN_DEVICE Tile<E> group(int number, int i, bool token_minor) const {
    if (resident()) return other(number, i, token_minor);
    return make_tile<P>(shared(stage(number) + geometry_.columns_at + i * geometry_.group), token_minor,
                        geometry_.columns, kOthers);
  }
  XATTN_DEVICE const Statistics* staged_statistics(int number) const {
    return reinterpret_cast<const Statistics*>(shared(stage(number) + geometry_.statistics_at));
  }

  // The next one of the other side that has tokens: to be read after a barrier. While it is written, others may
  // still read the one before.
  XATTN_DEVICE void open() {
    XATTN_KEEP_LOOP
    for (; member_ < last_; ++member_) {
      const int64_t slot = args_.table[member_];
      const View view = args_.table.view(args_.other[0], slot);
      left_ = view.tokens;
      if (left_ == 0) continue;
      opened_ ^= 1;
      if (thread_index() == 0) {
        set(control().other[opened_][0], view, 0);
        set(control().other[opened_][1], args_.table.view(args_.other[1], slot), 1);
        if (Plan::kSources) control().statistics[opened_] = statistics(slot);
      }
      return;
    }
  }

  // Starts to load what a step needs; on to the next chunk of channels, tile of tokens, or member of the list.
  XATTN_DEVICE Step load(int number) {
    const Matrix<E>* matrices = control().other[opened_];
    const int64_t token = matrices[0].view.tokens - left_;
    const Step step{chunk_,
                    least(left_, kOthers),
                    control().own[0].access.token_minor,
                    control().own[1].access.token_minor,
                    matrices[0].access.token_minor,
                    matrices[1].access.token_minor};
    const bool ends = Plan::kWhole || chunk_ == geometry_.chunks - 1;
    XATTN_KEEP_LOOP
    for (int i = 0; i < (resident() ? 4 : 6); ++i) {
      // The other side, the own one, and where only chunks are at hand, what results are sums of.
      const int kind = i / 2, side = i % 2;
      if (kind == 1 && resident() && number > 0) continue;
      if (kind == 2 && (!ends || columns(side) == 0)) continue;
      const Matrix<E>& from = kind == 1 ? control().own[side] : matrices[side];
      const bool token_minor = Plan::kWhole ? args_.layout == Layout::kTokenMinor : from.access.token_minor;
      const Tile<E> to = kind == 0   ? other(number, side, token_minor)
                         : kind == 1 ? own(number, side, token_minor)
                                     : group(number, side, token_minor);
      const int channel = kind == 2 ? control().place.column : chunk_ * chunk();
      const int channels = kind == 2 ? columns(side) : least(args_.channels[side] - channel, chunk());
      if (channels <= 0) continue;
      load_part<Plan::kChannels>(from,
                                 {kind == 1 ? begin_ : token, channel, channels, kind == 1 ? tokens_ : step.tokens,
                                  padded_width(channels), kind == 1 ? kTokens : kOthers},
                                 to);
    }
    if (Plan::kSources && ends && thread_index() < kOthers / 2) {
      const int i = 2 * thread_index();
      copy_async<16>(const_cast<Statistics*>(staged_statistics(number)) + i, control().statistics[opened_] + token + i);
    }
    commit_copies();
    if (!ends) {
      ++chunk_;
      return step;
    }
    chunk_ = 0;
    left_ -= kOthers;
    if (left_ <= 0) {
      ++member_;
      open();
    }
    return step;
  }

  // Everything in a list of the other side.
  XATTN_DEVICE void go_through(int64_t list) {
    member_ = static_cast<int>(args_.table[args_.lists + list]);
    last_ = static_cast<int>(args_.table[args_.lists + list + 1]);
    open();
    int loaded = 0, done = 0;
    Step next{};
    XATTN_KEEP_LOOP
    while (member_ < last_ || done < loaded) {
      const Step now = next;
      const bool ready = done < loaded;
      wait_copies<0>();
      sync_threads();
      if (member_ < last_ && loaded < done + geometry_.stages) next = load(loaded++);
      if (!ready) continue;
      score(done, now);
      if (Plan::kWhole || now.chunk == geometry_.chunks - 1) {
        weigh(done, now.tokens);
        if constexpr (Plan::kSources) {
          if (second_columns_ > 0) add(second_, scores_, done, 1, now.second_minor);
        }
        if (first_columns_ > 0) add(first_, products_, done, 0, now.first_minor);
      }
      ++done;
    }
  }

  static XATTN_DEVICE int row() { return warp() * 16 * kRowTiles; }

  XATTN_DEVICE void score(int number, const Step& now) {
    if (Plan::kWhole || now.chunk == 0) {
      scores_.clear();
      products_.clear();
    }
    score(scores_, number, now.chunk, 0, now.own_first_minor, now.first_minor);
    if (first_columns_ > 0) score(products_, number, now.chunk, 1, now.own_second_minor, now.second_minor);
  }
  // sum += own^T other, both of the first or both of the second matrices.
  XATTN_DEVICE void score(Scores& sum, int number, int chunk, int i, bool own_minor, bool other_minor) const {
    if constexpr (Plan::kWhole) {
      args_.layout == Layout::kTokenMinor ? score_whole<true>(sum, number, i) : score_whole<false>(sum, number, i);
    } else {
      const int depth = padded_width(least(args_.channels[i] - chunk * geometry_.chunk, geometry_.chunk));
      with_layouts<E>(own_minor, other_minor, [&](bool left, bool right) {
        multiply_add<P>(sum, own(number, i, left).over_channels(), row(), other(number, i, right).over_channels(), 0, 0,
                        depth);
      });
    }
  }
  template <bool kTokenMinor>
  XATTN_DEVICE void score_whole(Scores& sum, int number, int i) const {
    const auto left = left_pieces<!kTokenMinor>(own(number, i, kTokenMinor).over_channels(), row());
    const auto right = right_pieces<!kTokenMinor>(other(number, i, kTokenMinor).over_channels(), 0, 0);
    XATTN_UNROLL
    for (int k = 0; k < Plan::kChannels / 16; ++k) {
      uint32_t fragments[kRowTiles][4];
      XATTN_UNROLL
      for (int m = 0; m < kRowTiles; ++m) left.load(fragments[m], m, k);
      multiply_step(sum, fragments, right, k);
    }
  }

  template <int kColumns>
  XATTN_DEVICE void add(Accumulator<kRowTiles, kColumns>& sum, const Scores& left, int number, int i,
                        bool token_minor) const {
    if (!Plan::kWhole)
      multiply_add<P>(sum, left, group(number, i, token_minor).over_tokens(), resident() ? control().place.column : 0,
                      0, padded_width(columns(i)));
    else if (args_.layout == Layout::kTokenMinor)
      multiply_add<P>(sum, left, other(number, i, true).over_tokens(), 0, 0);
    else
      multiply_add<P>(sum, left, other(number, i, false).over_tokens(), 0, 0);
  }

  // Scores to p, products to ds.
  XATTN_DEVICE void weigh(int number, int tokens) {
    const float scale = args_.exponent_scale;
    if constexpr (Plan::kSources) {
      // Beyond the last query weights are 1, of queries and gradients that are 0.
      const Statistics* columns = staged_statistics(number);
      for_scores([&](float& s, float& product, int, int, int column) {
        s = exp2_approximate(fused_multiply_add(s, scale, -columns[column].lse));
        product = s * (product - columns[column].delta);
      });
    } else {
      for_scores([&](float& s, float& product, int m, int i, int) {
        product = exp2_approximate(fused_multiply_add(s, scale, -rows_[m][i].lse)) * (product - rows_[m][i].delta);
      });
      if (tokens < kOthers)
        for_scores([&](float&, float& product, int, int, int column) { product = column < tokens ? product : 0.0f; });
    }
  }

  // Of this lane: rows, halves i of their tiles m; and scores and products with the numbers of their tokens.
  template <class Body>
  static XATTN_DEVICE void for_rows(const Body& body) {
    XATTN_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      XATTN_UNROLL
      for (int i = 0; i < 2; ++i) body(m, i);
    }
  }
  template <class Body>
  XATTN_DEVICE void for_scores(const Body& body) {
    const int t = lane() % 4;
    XATTN_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < kOthers / 8; ++n) {
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) body(scores_.v[m][n][i], products_.v[m][n][i], m, i / 2, 8 * n + 2 * t + i % 2);
      }
    }
  }

  XATTN_DEVICE void read_statistics(int64_t output) {
    const Statistics* from = statistics(output) + begin_;
    for_rows([&](int m, int i) {
      const int token = row() + 16 * m + 8 * i + lane() / 4;
      rows_[m][i] = token < tokens_ ? from[token] : Statistics{0.0f, 0.0f};
    });
  }

  XATTN_DEVICE void finish() {
    const float scale = args_.scale;
    XATTN_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      XATTN_UNROLL
      for (int n = 0; n < Plan::kFirst / 8; ++n) {
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) first_.v[m][n][i] *= scale;
      }
    }
    store(first_, 0);
    if constexpr (Plan::kSources) store(second_, 1);
  }
  template <int kColumns>
  XATTN_DEVICE void store(Accumulator<kRowTiles, kColumns>& sum, int i) const {
    if (columns(i) <= 0) return;
    const Place place = control().place;
    store_rows<P, kTokens>(sum, args_.table.view(args_.results[i], place.slot), args_.dtype, place.batch,
                           place.head * args_.channels[i] + place.column, columns(i), begin_);
  }

  const GradientArguments& args_;
  const GradientGeometry& geometry_;
  int64_t begin_, left_ = 0;  // tokens of a member of which none is loaded yet
  int member_ = 0, last_ = 0, opened_ = 0, chunk_ = 0, tokens_, first_columns_,
      second_columns_;  // of results, 0 where not wanted
  Statistics rows_[kRowTiles][2];
  Scores scores_, products_;
  Accumulator<kRowTiles, Plan::kFirst / 8> first_;
  Accumulator<kRowTiles, (Plan::kSources ? Plan::kSecond : 16) / 8> second_;
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, 2)
gradient_kernel(XATTN_PARAMETER GradientArguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count())
    Block<Plan>(args, static_cast<uint32_t>(work)).run();
}

template <class Plan>
GradientGeometry geometry(int width, int columns, int chunk, int stages) {
  using P = typename Plan::P;
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element));
  GradientGeometry g{};
  g.chunk = chunk;
  g.chunks = (width + chunk - 1) / chunk;
  g.columns = columns;
  g.stages = stages;
  g.own = tile_elements<P>(chunk, Plan::kTokens) * kBytes;
  g.second = tile_elements<P>(chunk, Plan::kOthers) * kBytes;
  g.group = tile_elements<P>(columns, Plan::kOthers) * kBytes;
  g.own_at = 2 * g.second;
  g.columns_at = g.own_at + (g.chunks > 1 ? 2 * g.own : 0);
  g.statistics_at = g.columns_at + (g.chunks > 1 ? (Plan::kSources ? 2 : 1) * g.group : 0);
  g.stage = g.statistics_at + (Plan::kSources ? Plan::kOthers * static_cast<int>(sizeof(Statistics)) : 0);
  g.first = g.chunks > 1 ? 0 : 2 * g.own;
  g.shared = kControl + std::max(g.first + stages * g.stage, tile_elements<P>(columns, Plan::kTokens) * kBytes);
  return g;
}

// All channels at once if they fit, in two stages if these do.
template <class Plan>
GradientGeometry choose_geometry(int width, int columns, int shared_bytes) {
  GradientGeometry last{};
  for (const int chunk : {width, 96, 64, 32}) {
    if (chunk > width || (Plan::kWhole && chunk != width)) continue;
    for (const int stages : {2, 1}) {
      last = geometry<Plan>(width, columns, chunk, stages);
      if (last.shared <= shared_bytes) return last;
    }
  }
  return last;
}

template <class Plan>
void start(GradientArguments args, const char* name, int64_t slots, int64_t longest, Stream stream) {
  const int width = Plan::kWhole ? Plan::kChannels : padded_width(std::max(args.channels[0], args.channels[1]));
  const int columns = Plan::kSources ? width : padded_width(args.channels[0]);
  args.groups = static_cast<uint32_t>((columns + Plan::kFirst - 1) / Plan::kFirst);
  args.steps = static_cast<uint32_t>((longest + Plan::kTokens - 1) / Plan::kTokens);
  args.works = works(name, {slots, args.batch, args.heads, args.groups, args.steps});
  args.geometry =
      choose_geometry<Plan>(width, padded_width((columns + args.groups - 1) / args.groups), limits().shared_bytes);
  launch(gradient_kernel<Plan>, name, args.works, Plan::kThreads, static_cast<size_t>(args.geometry.shared), stream,
         args);
}

template <int kWidth, int kRowTiles, int kOthers>
using Queries = Plan<BFloat16Products, kWidth, kWidth, 0, kRowTiles, kOthers>;
template <int kWidth, int kRowTiles, int kOthers>
using Sources = Plan<BFloat16Products, kWidth, kWidth, kWidth, kRowTiles, kOthers>;

}  // namespace

void start_query_gradients(const GradientArguments& args, bool tf32, int64_t slots, int64_t longest, Stream stream) {
  constexpr char kName[] = "softmax_query_gradients";
  if (args.dtype != Dtype::kBFloat16) {
    if (args.dtype == Dtype::kFloat16 || tf32)
      return start<Plan<Tf32Products, 0, 96, 0, 1, 32>>(args, kName, slots, longest, stream);
    return start<Plan<IeeeProducts, 0, 96, 0, 1, 32>>(args, kName, slots, longest, stream);
  }
  const int width = padded_width(args.channels[0]);
  switch (width == padded_width(args.channels[1]) && args.layout != Layout::kMixed ? width : 0) {
    case 32:
      return start<Queries<32, 2, 32>>(args, kName, slots, longest, stream);
    case 48:
      return start<Queries<48, 2, 32>>(args, kName, slots, longest, stream);
    case 80:
      return start<Queries<80, 1, 64>>(args, kName, slots, longest, stream);
    case 96:
      return start<Queries<96, 1, 64>>(args, kName, slots, longest, stream);
    case 144:
      return start<Queries<144, 1, 32>>(args, kName, slots, longest, stream);
    default:
      return start<Plan<BFloat16Products, 0, 192, 0, 1, 32>>(args, kName, slots, longest, stream);
  }
}

void start_source_gradients(const GradientArguments& args, bool tf32, int64_t slots, int64_t longest, Stream stream) {
  constexpr char kName[] = "softmax_source_gradients";
  if (args.dtype != Dtype::kBFloat16) {
    if (args.dtype == Dtype::kFloat16 || tf32)
      return start<Plan<Tf32Products, 0, 96, 96, 1, 32>>(args, kName, slots, longest, stream);
    return start<Plan<IeeeProducts, 0, 96, 96, 1, 32>>(args, kName, slots, longest, stream);
  }
  const int width = padded_width(args.channels[0]);
  switch (width == padded_width(args.channels[1]) && args.layout != Layout::kMixed ? width : 0) {
    case 32:
      return start<Sources<32, 2, 32>>(args, kName, slots, longest, stream);
    case 48:
      return start<Sources<48, 2, 32>>(args, kName, slots, longest, stream);
    case 80:
      return start<Sources<80, 1, 32>>(args, kName, slots, longest, stream);
    case 96:
      return start<Sources<96, 1, 32>>(args, kName, slots, longest, stream);
    case 144:
      return start<Sources<144, 1, 32>>(args, kName, slots, longest, stream);
    default:
      return start<Plan<BFloat16Products, 0, 144, 144, 1, 32>>(args, kName, slots, longest, stream);
  }
}

}  // namespace xattn::cuda
