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

  XATTN_DEVICE Block(const Arguments& args, int64_t work) : args_(args), problem_(args.problem) {
    pair_ = work % problem_.count;
    work /= problem_.count;
    begin_ = work % args.runs * args.run;
    batch_ = work / args.runs;
    x_ = args.table.view(problem_.features, args.table[problem_.pairs + 2 * pair_]);
    end_ = begin_ + args.run < x_.tokens ? begin_ + args.run : x_.tokens;
    channels_ = {static_cast<int>(problem_.channels), static_cast<int>(padded_channels(problem_.channels))};
  }

  XATTN_DEVICE void run() {
    if (begin_ >= end_) return;
    access_ = access<BFloat16>(x_, Dtype::kBFloat16);
    const int64_t set = args_.table[problem_.pairs + 2 * pair_ + 1] * kProjections;
    const int padded = channels_.padded;
    const auto source = [=](int i) {
      const int projection = i == 0 ? kValue : i == 1 ? kKey1 : kKey2;
      return problem_.packed.matrices + (set + projection) * padded * padded * 2;
    };
    const int64_t uses = (end_ - begin_ + args_.geometry.tile - 1) / args_.geometry.tile;
    MatrixStream<true, decltype(source)> matrices(shared_memory(), padded, args_.geometry.piece, 3, uses, source);
    load(0);
    matrices.begin(padded);
    copy_biases(bias(0), padded, problem_.packed.biases + (set + kKey1) * padded, padded, 3);
    wait_copies<1>();
    sync_threads();
    XATTN_KEEP_LOOP
    for (int number = 0; begin_ + number * static_cast<int64_t>(args_.geometry.tile) < end_; ++number) {
      sync_warp();
      Fragments<S> x, h;
      load_fragments(slab(), channels_, x);
      sync_warp();
      load(number + 1);
      emit<Activation::kRelu>(x, bias(2), problem_.values, number, matrices);
      project<Activation::kRelu>(x, bias(0), channels_, [&](int) { return matrices.next(); }, h);
      emit<Activation::kSoftplus>(h, bias(1), problem_.keys, number, matrices);
    }
    wait_copies<0>();
    sync_threads();
  }

 private:
  XATTN_DEVICE int64_t token(int number) const {
    return begin_ + static_cast<int64_t>(number) * args_.geometry.tile + warp() * kTokens;
  }
  XATTN_DEVICE int tokens(int number) const {
    const int64_t left = end_ - token(number);
    return left > kTokens ? kTokens : left > 0 ? static_cast<int>(left) : 0;
  }
  XATTN_DEVICE char* memory() const { return shared_memory() + args_.geometry.slabs + warp() * Plan::kWarpBytes; }
  XATTN_DEVICE Slab<kTokens> slab() const { return Slab<kTokens>::make(memory(), S::kWidth, access_.token_minor); }
  XATTN_DEVICE float* bias(int matrix) const {
    return reinterpret_cast<float*>(shared_memory() + args_.geometry.biases) + matrix * channels_.padded;
  }
  XATTN_DEVICE void load(int number) const {
    load_part<S::kWidth>(x_, access_, {batch_, token(number), 0, channels_.count, tokens(number)},
                         S::kExact ? S::kWidth : channels_.padded, slab());
  }

  // activation(W x + b) of a tile to where the table has the pair's keys or values.
  template <Activation kActivation, class Matrices>
  XATTN_DEVICE void emit(const Fragments<S>& x, const float* bias, int views, int number, Matrices& matrices) const {
    const View out = args_.table.view(views, pair_);
    const Access out_access{Dtype::kBFloat16, false, 16};
    const Slab<kTokens> to = Slab<kTokens>::make(memory() + Plan::kSlab, Plan::kGathered, false);
    gather<Plan, false>(
        x, channels_, to, matrices, [&](Sums<S>& sums, int m) { begin_with<false>(sums, bias + 16 * m); },
        [&](const Sums<S>& sums, int, int b, int h, int r) {
          return activate<kActivation>(sums.v[b][h][2 * r], sums.v[b][h][2 * r + 1]);
        },
        [&](int first, int count) {
          store_part<Plan::kGathered>(out, out_access, {batch_, token(number), 16 * first, 16 * count, tokens(number)},
                                      to);
        });
  }

  const Arguments& args_;
  const BlockSources& problem_;
  View x_;
  Access access_;
  int64_t pair_, batch_, begin_, end_;
  Channels channels_;
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kResident)
projection_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int64_t work = block_index(); work < args.works; work += block_count()) Block<Plan>(args, work).run();
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
  args.run = choose_tokens(problem.longest, problem.count * problem.batch, args.geometry.tile, resident);
  args.runs = (problem.longest + args.run - 1) / args.run;
  args.works = args.runs * problem.batch * problem.count;
  launch(projection_kernel<Plan>, kName, args.works, args.geometry.threads, shared, stream, args);
}

}  // namespace

void start_chain_projections(const BlockSources& sources, const Table& table, Stream stream) {
  const Arguments args{table, sources, {}, 0, 0, 0};
  const int64_t padded = padded_channels(sources.channels);
  if (padded == 144)
    start<ChainPlan<Shape<144, 129, 32, true>, 256, 1, true>>(args, stream);
  else if (padded <= 192)
    start<ChainPlan<Shape<192, 1, 16, false>, 256, 1, true>>(args, stream);
  else if (padded == 288)
    start<ChainPlan<Shape<288, 273, 16, true>, 256, 1, true>>(args, stream);
  else
    start<ChainPlan<Shape<384, 1, 16, false>, 256, 1, true>>(args, stream);
}

}  // namespace xattn::cuda
