// Softmax cross-attention, forward, with online softmax: no score matrix in memory.
//
//   out_o[:, m] = sum_n p_mn v_n,   p_mn = exp(scale q_m . k_n - lse_m),   over the tokens n of all sources of o
//
// Plan: a block has a tile of an output's queries of one head and goes through the keys and values of its
// sources where they are, tile by tile, the next one on its way. A warp has 16 or 32 queries. Its scores are the
// result of a product and, as probabilities, the left operand of the next: they never leave its registers, nor do
// its sums. Exponents are of base 2, with the scale folded in: 2^(c s - top). `top` is a maximum of scores so far;
// for bfloat16, sums are scaled to a new one only when a score exceeds it by 2^8, as they have room for that.
//
// bfloat16 heads of usual widths have kernels of exactly these (multiples of 16). There narrow heads are bound by
// exponentials, and every fourth one is a polynomial on the units of multiply-adds. All other widths have kernels
// that skip what a head does not have; scores of wide heads are summed over chunks of channels where shared
// memory does not hold all of them, and more values than registers have room for are groups, works of their own.
#include <algorithm>

#include "softmax.h"

namespace xattn::cuda {
namespace {

// Offsets and sizes in bytes of shared memory, and what they stand for.
struct Geometry {
  int chunk, chunks;  // channels of queries and keys at a time
  int values;         // channels of values in a group
  int stages;         // tiles of keys and values: one is in use, the other on its way
  int stage;          // bytes of one
  int first;          // the first one, after queries if these stay
  int values_at, queries_at;
  int shared;
};

struct Arguments {
  Table table;
  Dtype dtype;
  Layout layout;                                     // of queries, keys and values
  bool negative;                                     // scale
  float scale;                                       // to base 2, without its sign
  int queries, keys, values, outputs, sources, lse;  // in the table; a query for every output
  int64_t channels, value_channels;                  // of a head
  uint32_t batch, heads, groups, steps, works;
  Geometry geometry;
};

// kChannels, kValues: padded widths of a head, or 0 and the most values of a group. kWarps warps have 16 kRowTiles
// queries each, against kKeys keys at a time.
template <class Products, int kChannelsOfPlan, int kValuesOfPlan, int kRowTilesOfPlan, int kKeysOfPlan,
          int kBlocksOfPlan>
struct Plan {
  using P = Products;
  static constexpr int kChannels = kChannelsOfPlan, kValues = kValuesOfPlan, kRowTiles = kRowTilesOfPlan,
                       kKeys = kKeysOfPlan, kBlocks = kBlocksOfPlan;
  static constexpr int kWarps = 4, kThreads = kWarp * kWarps, kTokens = 16 * kRowTiles * kWarps;
  static constexpr bool kWhole = kChannels > 0;
  // Steps of 16 channels whose fragments of queries stay in registers: all if there is room.
  static constexpr int kKept = kWhole && kRowTiles * kChannels / 4 <= 48 ? kChannels / 16 : 1;
  // One of so many exponentials is a polynomial; 0: none.
  static constexpr int kPolynomials = kWhole && kChannels <= 48 ? 9 : 0;
};

template <class Plan>
class Block {
 public:
  using P = typename Plan::P;
  using E = typename P::Element;
  static constexpr int kRowTiles = Plan::kRowTiles, kKeys = Plan::kKeys, kTokens = Plan::kTokens;

  XATTN_DEVICE Block(const Arguments& args, uint32_t work) : args_(args), geometry_(args.geometry) {
    begin_ = static_cast<int64_t>(work % args.steps) * kTokens;
    work /= args.steps;
    Place place;
    place.value = static_cast<int>(work % args.groups) * geometry_.values;
    work /= args.groups;
    place.head = work % args.heads;
    work /= args.heads;
    place.batch = work % args.batch;
    place.output = work / args.batch;
    place.values = least(args.value_channels - place.value, geometry_.values);
    values_ = place.values;
    member_ = static_cast<int>(args.table[args.sources + place.output]);
    last_ = static_cast<int>(args.table[args.sources + place.output + 1]);
    const View query = args.table.view(args.queries, place.output);
    tokens_ = least(query.tokens - begin_, kTokens);
    query_minor_ = is_token_minor(query);
    if (tokens_ > 0 && thread_index() == 0) {
      control().place = place;
      control().query.set(query, args.dtype, place.batch, place.head * args.channels);
    }
  }

  XATTN_DEVICE void run() {
    if (tokens_ <= 0) return;
    sum_.clear();
    for_rows([&](int m, int i) {
      top_[m][i] = -kInfinity;
      total_[m][i] = 0.0f;
    });
    open();
    attend();
    finish();
  }

 private:
  // In shared memory: which part of the problem this is, and sources that are read now and next.
  struct Place {
    int64_t output, batch, head;
    int value, values;
  };
  struct Control {
    Place place;
    Matrix<E> query, source[2][2];  // keys and values
  };
  static_assert(sizeof(Control) <= kControl, "room in shared memory");
  static XATTN_DEVICE Control& control() { return *reinterpret_cast<Control*>(shared_memory()); }

  // What is computed with a stage.
  struct Step {
    int chunk, tokens;
    bool key_minor, value_minor;
  };

  static XATTN_DEVICE E* shared(int offset) { return reinterpret_cast<E*>(shared_memory() + kControl + offset); }
  XATTN_DEVICE int stage(int number) const {
    return geometry_.first + (number & (geometry_.stages - 1)) * geometry_.stage;
  }
  XATTN_DEVICE int chunk() const { return Plan::kWhole ? Plan::kChannels : geometry_.chunk; }
  XATTN_DEVICE bool resident() const { return Plan::kWhole || geometry_.chunks == 1; }
  XATTN_DEVICE int width() const { return Plan::kWhole ? Plan::kValues : padded_width(values_); }

  XATTN_DEVICE Tile<E> queries(int number, bool token_minor) const {
    return make_tile<P>(shared(resident() ? 0 : stage(number) + geometry_.queries_at), token_minor, chunk(), kTokens);
  }
  XATTN_DEVICE Tile<E> keys(int number, bool token_minor) const {
    return make_tile<P>(shared(stage(number)), token_minor, chunk(), kKeys);
  }
  XATTN_DEVICE Tile<E> values(int number, bool token_minor) const {
    const int rows = Plan::kWhole ? Plan::kValues : geometry_.values;
    return make_tile<P>(shared(stage(number) + geometry_.values_at), token_minor, rows, kKeys);
  }

  // The next source that has tokens: to be read after a barrier. While it is written, others may still read the
  // one before.
  XATTN_DEVICE void open() {
    XATTN_KEEP_LOOP
    for (; member_ < last_; ++member_) {
      const int64_t source = args_.table[member_];
      const View key = args_.table.view(args_.keys, source);
      left_ = key.tokens;
      if (left_ == 0) continue;
      opened_ ^= 1;
      if (thread_index() == 0) {
        const Place& place = control().place;
        Matrix<E>* to = control().source[opened_];
        to[0].set(key, args_.dtype, place.batch, place.head * args_.channels);
        to[1].set(args_.table.view(args_.values, source), args_.dtype, place.batch,
                  place.head * args_.value_channels + place.value);
      }
      return;
    }
  }

  // Starts to load what a step needs; on to the next chunk of channels, tile of tokens, or source.
  XATTN_DEVICE Step load(int number) {
    const Matrix<E>* source = control().source[opened_];
    const int64_t token = source[0].view.tokens - left_;
    const Step step{chunk_, least(left_, kKeys), source[0].access.token_minor, source[1].access.token_minor};
    const bool ends = Plan::kWhole || chunk_ == geometry_.chunks - 1;
    const int channel = chunk_ * chunk(), channels = least(args_.channels - channel, chunk());
    XATTN_KEEP_LOOP
    for (int i = 0; i < 3; ++i) {
      if (i == 1 && !ends) continue;
      if (i == 2 && resident() && number > 0) continue;
      const Tile<E> to = i == 0   ? keys(number, step.key_minor)
                         : i == 1 ? values(number, step.value_minor)
                                  : queries(number, query_minor_);
      TilePart part{token, channel, channels, step.tokens, padded_width(channels), kKeys};
      if (i == 1) {
        part.channel = 0;
        part.channels = values_;
        part.padded_channels = width();
      } else if (i == 2) {
        part.token = begin_;
        part.tokens = tokens_;
        part.padded_tokens = kTokens;
      }
      load_part<Plan::kChannels>(i == 2 ? control().query : source[i], part, to);
    }
    commit_copies();
    if (!ends) {
      ++chunk_;
      return step;
    }
    chunk_ = 0;
    left_ -= kKeys;
    if (left_ <= 0) {
      ++member_;
      open();
    }
    return step;
  }

  XATTN_DEVICE void attend() {
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
        normalise(now.tokens);
        add(done, now);
      }
      ++done;
    }
  }

  static XATTN_DEVICE int row() { return warp() * 16 * kRowTiles; }

  XATTN_DEVICE void score(int number, const Step& now) {
    if constexpr (Plan::kWhole) {
      args_.layout == Layout::kTokenMinor ? score_whole<true>(number) : score_whole<false>(number);
    } else {
      if (now.chunk == 0) scores_.clear();
      const int channels = least(args_.channels - now.chunk * geometry_.chunk, geometry_.chunk);
      with_layouts<E>(query_minor_, now.key_minor, [&](bool left, bool right) {
        multiply_add<P>(scores_, queries(number, left).over_channels(), row(), keys(number, right).over_channels(), 0,
                        0, padded_width(channels));
      });
    }
  }
  template <bool kTokenMinor>
  XATTN_DEVICE void score_whole(int number) {
    const auto left = left_pieces<!kTokenMinor>(queries(0, kTokenMinor).over_channels(), row());
    const auto right = right_pieces<!kTokenMinor>(keys(number, kTokenMinor).over_channels(), 0, 0);
    scores_.clear();
    XATTN_UNROLL
    for (int k = 0; k < Plan::kChannels / 16; ++k) {
      uint32_t (&fragments)[kRowTiles][4] = kept_[k % Plan::kKept];
      if (Plan::kKept == 1 || number == 0) {
        XATTN_UNROLL
        for (int m = 0; m < kRowTiles; ++m) left.load(fragments[m], m, k);
      }
      multiply_step(scores_, fragments, right, k);
    }
  }

  XATTN_DEVICE void add(int number, const Step& now) {
    if (!Plan::kWhole)
      multiply_add<P>(sum_, scores_, values(number, now.value_minor).over_tokens(), 0, 0, width());
    else if (args_.layout == Layout::kTokenMinor)
      multiply_add<P>(sum_, scores_, values(number, true).over_tokens(), 0, 0);
    else
      multiply_add<P>(sum_, scores_, values(number, false).over_tokens(), 0, 0);
  }

  // Scores to probabilities, not yet divided by their sum.
  XATTN_DEVICE void normalise(int tokens) {
    if (args_.negative) for_scores([](float& s, int, int, int) { s = -s; });
    if (tokens < kKeys) for_scores([=](float& s, int, int, int column) { s = column < tokens ? s : -kInfinity; });
    constexpr float kRoom = P::kExact ? 0.0f : 8.0f;
    float most[kRowTiles][2];
    bool exceeded = false;
    for_rows([&](int m, int i) { most[m][i] = -kInfinity; });
    for_scores([&](float& s, int m, int i, int) { most[m][i] = larger(most[m][i], s); });
    for_rows([&](int m, int i) {
      most[m][i] = larger(most[m][i], shuffle_xor(most[m][i], 1));
      most[m][i] = larger(most[m][i], shuffle_xor(most[m][i], 2)) * args_.scale;
      exceeded = exceeded || most[m][i] > top_[m][i] + kRoom;
    });
    if (any(exceeded)) {
      for_rows([&](int m, int i) {
        most[m][i] = larger(most[m][i], top_[m][i]);
        const float factor = top_[m][i] < most[m][i] ? exp2_approximate(top_[m][i] - most[m][i]) : 1.0f;
        top_[m][i] = most[m][i];
        total_[m][i] *= factor;
        XATTN_UNROLL
        for (int n = 0; n < Plan::kValues / 8; ++n) {
          sum_.v[m][n][2 * i] *= factor;
          sum_.v[m][n][2 * i + 1] *= factor;
        }
      });
    }
    const float scale = args_.scale;
    float shift[kRowTiles][2];
    for_rows([&](int m, int i) { shift[m][i] = top_[m][i] == -kInfinity ? 0.0f : top_[m][i]; });
    [[maybe_unused]] int count = 0;
    for_scores([&](float& s, int m, int i, int) {
      const float x = fused_multiply_add(s, scale, -shift[m][i]);
      if constexpr (Plan::kPolynomials > 0)
        s = ++count % Plan::kPolynomials == 0 ? exp2_polynomial(x) : exp2_approximate(x);
      else
        s = exp2_approximate(x);
      total_[m][i] += s;
    });
  }

  // Of this lane: rows, halves i of their tiles m; and scores, with the numbers of their keys.
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
      for (int n = 0; n < kKeys / 8; ++n) {
        XATTN_UNROLL
        for (int i = 0; i < 4; ++i) body(scores_.v[m][n][i], m, i / 2, 8 * n + 2 * t + i % 2);
      }
    }
  }

  XATTN_DEVICE void finish() {
    sync_threads();
    const Place place = control().place;
    const View output = args_.table.view(args_.outputs, place.output);
    float* lse = reinterpret_cast<float*>(args_.table[args_.lse + place.output]) +
                 (place.batch * args_.heads + place.head) * output.tokens + begin_;
    for_rows([&](int m, int i) {
      total_[m][i] += shuffle_xor(total_[m][i], 1);
      total_[m][i] += shuffle_xor(total_[m][i], 2);
      const int token = row() + 16 * m + 8 * i + lane() / 4;
      if (place.value == 0 && lane() % 4 == 0 && token < tokens_)
        lse[token] = total_[m][i] == 0.0f ? -kInfinity : (top_[m][i] + log2_approximate(total_[m][i])) * kLn2;
      const float divisor = total_[m][i] == 0.0f ? 1.0f : total_[m][i], inverse = 1.0f / divisor;
      XATTN_UNROLL
      for (int n = 0; n < Plan::kValues / 8; ++n) {
        XATTN_UNROLL
        for (int j = 2 * i; j < 2 * i + 2; ++j)
          sum_.v[m][n][j] = quotient<P::kExact>(sum_.v[m][n][j], divisor, inverse);
      }
    });
    store_rows<P, kTokens>(sum_, output, args_.dtype, place.batch, place.head * args_.value_channels + place.value,
                           place.values, begin_);
  }

  const Arguments& args_;
  const Geometry& geometry_;
  int64_t begin_, left_ = 0;  // tokens of a source, of which none is loaded yet
  int member_, last_, opened_ = 0, chunk_ = 0, values_, tokens_;
  bool query_minor_;
  uint32_t kept_[Plan::kKept][kRowTiles][4];  // queries
  Accumulator<kRowTiles, kKeys / 8> scores_;
  Accumulator<kRowTiles, Plan::kValues / 8> sum_;
  float top_[kRowTiles][2], total_[kRowTiles][2];
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kBlocks)
forward_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count())
    Block<Plan>(args, static_cast<uint32_t>(work)).run();
}

template <class Plan>
Geometry geometry(int channels, int values, int chunk, int stages) {
  using P = typename Plan::P;
  constexpr int kBytes = static_cast<int>(sizeof(typename P::Element));
  Geometry g{chunk, (channels + chunk - 1) / chunk, values, stages, 0, 0, 0, 0, 0};
  const int queries = tile_elements<P>(chunk, Plan::kTokens) * kBytes;
  g.values_at = tile_elements<P>(chunk, Plan::kKeys) * kBytes;
  g.queries_at = g.values_at + tile_elements<P>(values, Plan::kKeys) * kBytes;
  g.stage = g.queries_at + (g.chunks > 1 ? queries : 0);
  g.first = g.chunks > 1 ? 0 : queries;
  g.shared = kControl + std::max(g.first + stages * g.stage, tile_elements<P>(values, Plan::kTokens) * kBytes);
  return g;
}

// All channels at once if they fit, in two stages if these do.
template <class Plan>
Geometry choose_geometry(int channels, int values, int shared_bytes) {
  Geometry last{};
  for (const int chunk : {channels, 96, 64, 32}) {
    if (chunk > channels || (Plan::kWhole && chunk != channels)) continue;
    for (const int stages : {2, 1}) {
      last = geometry<Plan>(channels, values, chunk, stages);
      if (last.shared <= shared_bytes) return last;
    }
  }
  return last;
}

template <class Plan>
void start(Arguments args, int64_t outputs, int64_t longest, Stream stream) {
  const int channels = padded_width(args.channels), values = padded_width(args.value_channels);
  args.groups = static_cast<uint32_t>((values + Plan::kValues - 1) / Plan::kValues);
  args.steps = static_cast<uint32_t>((longest + Plan::kTokens - 1) / Plan::kTokens);
  args.works = works("softmax_forward", {outputs, args.batch, args.heads, args.groups, args.steps});
  args.geometry =
      choose_geometry<Plan>(channels, padded_width((values + args.groups - 1) / args.groups), limits().shared_bytes);
  launch(forward_kernel<Plan>, "softmax_forward", args.works, Plan::kThreads, static_cast<size_t>(args.geometry.shared),
         stream, args);
}

template <int kWidth, int kRowTiles, int kKeys, int kBlocks>
using Whole = Plan<BFloat16Products, kWidth, kWidth, kRowTiles, kKeys, kBlocks>;

void start_bfloat16(const Arguments& args, int64_t outputs, int64_t longest, Stream stream) {
  const int channels = padded_width(args.channels), values = padded_width(args.value_channels);
  switch (channels == values && args.layout != Layout::kMixed ? channels : 0) {
    case 32:
      return start<Whole<32, 2, 64, 2>>(args, outputs, longest, stream);
    case 48:
      return start<Whole<48, 2, 64, 2>>(args, outputs, longest, stream);
    case 64:
      return start<Whole<64, 2, 64, 2>>(args, outputs, longest, stream);
    case 80:
      return start<Whole<80, 2, 32, 2>>(args, outputs, longest, stream);
    case 96:
      return start<Whole<96, 2, 32, 2>>(args, outputs, longest, stream);
    case 144:
      return start<Whole<144, 2, 32, 2>>(args, outputs, longest, stream);
    case 192:
      return start<Whole<192, 1, 32, 2>>(args, outputs, longest, stream);
    case 288:
      return start<Whole<288, 1, 32, 2>>(args, outputs, longest, stream);
    default:
      return start<Plan<BFloat16Products, 0, 192, 1, 32, 2>>(args, outputs, longest, stream);
  }
}

}  // namespace

void softmax_forward(const SoftmaxProblem& problem, const Call& call) {
  const DeviceGuard guard(call.device);
  Scratch scratch;
  TableBuilder table;
  std::vector<View> queries;
  std::vector<std::vector<int64_t>> sources;
  int64_t longest = 0;
  for (int64_t output = 0; output < problem.outputs.size; ++output) {
    queries.push_back(problem.queries[problem.edges.query_of(output)]);
    longest = std::max(longest, problem.outputs[output].tokens);
    sources.emplace_back();
    for (int64_t e = problem.edges.output_begin[output]; e < problem.edges.output_begin[output + 1]; ++e)
      sources.back().push_back(problem.edges.all[e].source);
  }
  Arguments args{};
  args.dtype = problem.dtype;
  args.layout = common_layout({problem.queries, problem.keys, problem.values});
  args.negative = problem.scale < 0;
  args.scale = static_cast<float>(std::max(std::abs(problem.scale) * 1.4426950408889634, 1.2e-38));
  args.queries = table.add({queries.data(), problem.outputs.size});
  args.keys = table.add(problem.keys);
  args.values = table.add(problem.values);
  args.outputs = table.add(problem.outputs);
  args.sources = table.add_lists(sources);
  std::vector<int64_t> lse;
  for (int64_t output = 0; output < problem.outputs.size; ++output)
    lse.push_back(reinterpret_cast<int64_t>(problem.lse[output]));
  args.lse = table.add(lse);
  args.batch = static_cast<uint32_t>(problem.batch);
  args.heads = static_cast<uint32_t>(problem.heads);
  args.channels = problem.channels / problem.heads;
  args.value_channels = problem.value_channels / problem.heads;
  table.reserve(scratch);
  scratch.allocate(call);
  args.table = table.finish(scratch, call.stream);
  if (problem.dtype == Dtype::kBFloat16)
    start_bfloat16(args, problem.outputs.size, longest, call.stream);
  else if (problem.dtype == Dtype::kFloat16 || call.tf32)
    start<Plan<Tf32Products, 0, 96, 1, 32, 2>>(args, problem.outputs.size, longest, call.stream);
  else
    start<Plan<IeeeProducts, 0, 96, 1, 32, 2>>(args, problem.outputs.size, longest, call.stream);
}

}  // namespace xattn::cuda
