// Keys and values of the cross-attention block in bfloat16, stored: for channels whose states do not fit registers.
//
//   v = relu(W_v x + b)    h = relu(W_k1 x + b)    k = softplus(W_k2 h + b)
//
// S has C x C elements, and so many of them would be read and written, or keys computed again for every part of S,
// that storing k and v, C x N, costs less. Plan: as that of targets (block_target.cu), with another end.
#include "block.h"
#include "block_stream.h"

namespace xattn::cuda {
namespace {

struct Arguments {
  Table table;
  BlockSources problem;
  ChainGeometry geometry;
  int64_t runs, run, works;
};

template <class Plan>
class Block {
 public:
  using S = typename Plan::S;
  static constexpr int kTokens = S::kTokens;
  static_assert(Plan::kStream, "three matrices, piece by piece");

  XATTN_DEVICE Block(const Arguments& args, int work) : args_(args), problem_(args.problem), work_(work) {
    const View x = view();
    const int64_t left = x.tokens - begin();
    const int count = static_cast<int>(left < args.run ? left : args.run);
    empty_ = count <= 0;
    if (thread_index() == 0) tokens_of_run() = {run_of(x, batch(), begin()), count};
  }

  XATTN_DEVICE void run() {
    if (empty_) return;
    sync_threads();
    const int64_t set = args_.table[problem_.pairs + 2 * pair() + 1] * kProjections;
    const int padded = channels().padded;
    const auto source = [=](int i) {
      const int projection = i == 0 ? kValue : i == 1 ? kKey1 : kKey2;
      return problem_.packed.matrices + (set + projection) * padded * padded * 2;
    };
    const int uses = (tokens_of_run().count + args_.geometry.tile - 1) / args_.geometry.tile;
    MatrixStream<Plan, decltype(source)> matrices(shared_memory(), channels(), 3, uses, source);
    copy_biases(bias(0), problem_.packed.biases + (set + kKey1) * padded, padded, 3);
    load(0);
    matrices.begin(0);
    wait_copies<0>();
    sync_threads();
    // Barriers of the stream come between all that reads a slab and all that writes it.
    XATTN_KEEP_LOOP
    for (int number = 0; number * args_.geometry.tile < tokens_of_run().count; ++number) {
      Fragments<S> h;
      {
        Fragments<S> x;
        load_fragments<Order::kLeft>(slab(), channels(), x);
        emit<Activation::kRelu>(x, bias(2), problem_.values, number, matrices);
        project<Activation::kRelu>(x, bias(0), channels(), [&](int j) { return matrices.row(1, j); }, h);
      }
      load(number + 1);
      commit_copies();
      emit<Activation::kSoftplus>(h, bias(1), problem_.keys, number, matrices);
    }
    sync_threads();
  }

 private:
  // Computed again where they are wanted, rather than kept.
  XATTN_DEVICE int pair() const { return opaque(work_) % static_cast<int>(problem_.count); }
  XATTN_DEVICE int run_number() const {
    return opaque(work_) / static_cast<int>(problem_.count) % static_cast<int>(args_.runs);
  }
  XATTN_DEVICE int batch() const {
    return opaque(work_) / static_cast<int>(problem_.count) / static_cast<int>(args_.runs);
  }
  XATTN_DEVICE int64_t begin() const { return run_number() * args_.run; }
  XATTN_DEVICE View view() const {
    return args_.table.view(problem_.features, args_.table[problem_.pairs + 2 * pair()]);
  }

  XATTN_DEVICE Channels channels() const {
    const int count = static_cast<int>(problem_.channels);
    return {count, (count + 15) / 16 * 16};
  }
  XATTN_DEVICE int token(int number) const { return number * args_.geometry.tile + opaque(warp()) * kTokens; }
  XATTN_DEVICE int tokens(int number) const {
    const int left = tokens_of_run().count - token(number);
    return left > kTokens ? kTokens : left > 0 ? left : 0;
  }
  XATTN_DEVICE Tokens& tokens_of_run() const {
    return *reinterpret_cast<Tokens*>(shared_memory() + args_.geometry.run);
  }
  XATTN_DEVICE char* memory() const {
    return shared_memory() + args_.geometry.slabs + opaque(warp()) * Plan::kWarpBytes;
  }
  XATTN_DEVICE Slab<kTokens> slab() const {
    return Slab<kTokens>::make(memory(), S::kWidth, tokens_of_run().run.token_minor);
  }
  XATTN_DEVICE float* bias(int matrix) const {
    return reinterpret_cast<float*>(shared_memory() + args_.geometry.biases) + matrix * channels().padded;
  }
  XATTN_DEVICE void load(int number) const {
    load_part<S::kWidth>(
        tokens_of_run().run, [this] { return Whole{view(), batch(), begin()}; },
        {token(number), 0, channels().count, tokens(number)},
        S::kLoops == Loops::kCut ? 16 * deep_tiles<S>(channels().padded) : S::kWidth, slab());
  }

  // activation(W x + b) of a tile to where the table has the pair's keys or values.
  template <Activation kActivation, class Matrices>
  XATTN_DEVICE void emit(const Fragments<S>& x, const float* bias, int views, int number, Matrices& matrices) const {
    const auto whole = [&] { return Whole{args_.table.view(views, pair()), batch(), begin()}; };
    const Run out = run_of(whole().view, batch(), begin());
    const Slab<kTokens> to = Slab<kTokens>::make(memory() + Plan::kSlab, Plan::kGathered, false);
    gather<Plan, false, Order::kLeft>(
        x, channels(), to, [&](int m) { return matrices.row(0, m); },
        [&](Sums<S>& sums, int m) { begin_with<false>(sums, bias + 16 * m); },
        [&](const Sums<S>& sums, int, int b, int h, int r) {
          return activate<kActivation>(sums.v[b][h][2 * r], sums.v[b][h][2 * r + 1]);
        },
        [&](int first, int count) {
          store_part<Plan::kGathered>(out, whole, {token(number), 16 * first, 16 * count, tokens(number)}, to);
        });
  }

  const Arguments& args_;
  const BlockSources& problem_;
  bool empty_;
  int work_;  // tokens of the run
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kResident)
projection_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int work = block_index(); work < args.works; work += block_count()) Block<Plan>(args, work).run();
}

template <class Plan>
void start(Arguments args, Stream stream) {
  const int padded = static_cast<int>(padded_channels(args.problem.channels));
  args.geometry = chain_geometry<Plan>(padded, 3, limits().shared_bytes);
  constexpr const char* kName = "block_projections";
  const size_t shared = static_cast<size_t>(args.geometry.shared);
  const int64_t resident =
      resident_blocks(reinterpret_cast<const void*>(projection_kernel<Plan>), kName, args.geometry.threads, shared);
  const BlockSources& problem = args.problem;
  args.run = choose_tokens(problem.longest, problem.count * problem.batch, args.geometry.tile, resident, 20);
  args.runs = (problem.longest + args.run - 1) / args.run;
  args.works = checked_works(args.runs * problem.batch * problem.count, kName);
  launch(projection_kernel<Plan>, kName, args.works, args.geometry.threads, shared, stream, args);
}

}  // namespace

void start_chain_projections(const BlockSources& sources, const Table& table, Stream stream) {
  const Arguments args{table, sources, {}, 0, 0, 0};
  const int64_t padded = padded_channels(sources.channels);
  if (padded == 144)
    start<ChainPlan<Shape<144, 129, 32, Loops::kWhole>, 256, 1, 3>>(args, stream);
  else if (padded <= 192)
    start<ChainPlan<Shape<192, 1, 16, Loops::kCut>, 256, 1, 3>>(args, stream);
  else if (padded <= 256)
    start<ChainPlan<Shape<256, 193, 16, Loops::kRowsCut>, 256, 1, 2>>(args, stream);
  else if (padded == 288)
    start<ChainPlan<Shape<288, 273, 16, Loops::kWhole>, 256, 1, 2>>(args, stream);
  else
    start<ChainPlan<Shape<384, 257, 16, Loops::kRowsCut>, 256, 1, 2>>(args, stream);
}

}  // namespace xattn::cuda
