// Targets of the cross-attention block in bfloat16.
//
//   h = relu(W_q1 x + b)    q = softplus(W_q2 h + b)    out = S q / max(Z . q, eps)
//
// Plan: a block has a run of tokens of a pair of query and weights, and all outputs of that pair. A warp takes 32 or
// 16 tokens at a time, the next ones on their way, and has h and q in registers (block_chain.h); of every output it
// computes 16 channels after another, with tokens as columns where the output has rows of tokens, else as rows,
// gathers them in shared memory and stores vectors of 16 bytes where addresses allow. Denominators are sums of
// float32 products. Up to 96 channels W and S stay in shared memory for the run; beyond, pieces of them go by.
#include "block.h"
#include "block_stream.h"

namespace xattn::cuda {
namespace {

struct Arguments {
  Table table;
  BlockTargets problem;
  ChainGeometry geometry;
  int64_t runs, run, works;
};

// Whose run it is: outputs from `first` on of the lists of the table.
struct Target {
  int batch, set, first, outputs;
};
static_assert(sizeof(Tokens) + sizeof(Target) <= kTokensBytes, "room for what a run is");

template <class Plan>
class Block {
 public:
  using S = typename Plan::S;
  static constexpr int kTokens = S::kTokens;

  XATTN_DEVICE Block(const Arguments& args, int work) : args_(args), problem_(args.problem), work_(work) {
    const int batch = work / static_cast<int>(problem_.count) / static_cast<int>(args.runs);
    const View x = view();
    const int set = static_cast<int>(args.table[problem_.pairs + 2 * target() + 1]) * kProjections + kQuery1;
    const int first = static_cast<int>(args.table[problem_.lists + target()]);
    const int outputs = static_cast<int>(args.table[problem_.lists + target() + 1]) - first;
    const int64_t left = x.tokens - begin();
    const int count = static_cast<int>(left < args.run ? left : args.run);
    empty_ = count <= 0;
    if (thread_index() == 0) {
      tokens_of_run() = {run_of(x, batch, begin()), count};
      target_of_run() = {batch, set, first, outputs};
    }
  }

  XATTN_DEVICE void run() {
    if (empty_) return;
    sync_threads();
    const auto source = [this](int i) {
      const int64_t bytes = static_cast<int64_t>(channels().padded) * channels().padded * 2;
      return i < 2 ? problem_.packed.matrices + (target_of_run().set + i) * bytes
                   : problem_.states.s + state(i - 2) * bytes;
    };
    const int uses = (tokens_of_run().count + args_.geometry.tile - 1) / args_.geometry.tile;
    MatrixStream<Plan, decltype(source)> matrices(shared_memory(), channels(), 2 + target_of_run().outputs, uses,
                                                  source);
    if constexpr (Plan::kStream)
      copy_biases(bias(0), problem_.packed.biases + target_of_run().set * channels().padded, channels().padded, 2);
    else
      copy_projections<S>(shared_memory(), bias(0), problem_.packed, target_of_run().set, 2, channels().padded);
    load(0);
    matrices.begin(2);
    wait_copies<0>();
    sync_threads();
    // Without a stream to keep up with, a warp ends with its last token. With one, its barriers come between all that
    // reads a slab and all that writes it.
    XATTN_KEEP_LOOP
    for (int number = 0; number * args_.geometry.tile < tokens_of_run().count; ++number) {
      if (!Plan::kStream && token(number) >= tokens_of_run().count) break;
      Fragments<S> h;
      {
        if constexpr (!Plan::kStream) {
          wait_copies<0>();
          sync_warp();
        }
        Fragments<S> x;
        load_fragments<Order::kLeft>(slab(), channels(), x);
        project<Activation::kRelu>(x, bias(0), channels(), [&](int j) { return matrices.row(0, j); }, h);
        if constexpr (!Plan::kStream) sync_warp();
      }
      load(number + 1);
      commit_copies();
      attend(number, h, matrices);
    }
    wait_copies<0>();
    sync_threads();
  }

 private:
  // Computed again where they are wanted, rather than kept.
  XATTN_DEVICE int target() const { return opaque(work_) % static_cast<int>(problem_.count); }
  XATTN_DEVICE int run_number() const {
    return opaque(work_) / static_cast<int>(problem_.count) % static_cast<int>(args_.runs);
  }
  XATTN_DEVICE int64_t begin() const { return run_number() * args_.run; }
  XATTN_DEVICE View view() const {
    return args_.table.view(problem_.features, args_.table[problem_.pairs + 2 * target()]);
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
  XATTN_DEVICE Target& target_of_run() const { return *reinterpret_cast<Target*>(&tokens_of_run() + 1); }
  XATTN_DEVICE char* memory() const {
    return shared_memory() + args_.geometry.slabs + opaque(warp()) * Plan::kWarpBytes;
  }
  XATTN_DEVICE Slab<kTokens> slab() const {
    return Slab<kTokens>::make(memory(), S::kWidth, tokens_of_run().run.token_minor);
  }
  XATTN_DEVICE float* bias(int matrix) const {
    const int padded = Plan::kStream ? channels().padded : S::kPadded;
    return reinterpret_cast<float*>(shared_memory() + args_.geometry.biases) + matrix * padded;
  }
  // Where the state of an output is.
  XATTN_DEVICE int64_t state(int i) const {
    return args_.table[target_of_run().first + i] * problem_.batch + target_of_run().batch;
  }

  XATTN_DEVICE void load(int number) const {
    load_part<S::kWidth>(
        tokens_of_run().run, [this] { return Whole{view(), target_of_run().batch, begin()}; },
        {token(number), 0, channels().count, tokens(number)},
        S::kLoops == Loops::kCut ? 16 * deep_tiles<S>(channels().padded) : S::kWidth, slab());
  }

  template <class Matrices>
  XATTN_DEVICE void attend(int number, const Fragments<S>& h, Matrices& matrices) const {
    Fragments<S> q;
    project<Activation::kSoftplus>(h, bias(1), channels(), [&](int j) { return matrices.row(1, j); }, q);
    // Turned in place when an output wants it otherwise than the one before: there is no room for both.
    bool turned = false;
    XATTN_KEEP_LOOP
    for (int i = 0; i < target_of_run().outputs; ++i) {
      const auto out_view = [&] { return args_.table.view(problem_.outputs, args_.table[target_of_run().first + i]); };
      const Run out = run_of(out_view(), target_of_run().batch, begin());
      const auto whole = [&] { return Whole{out_view(), target_of_run().batch, begin()}; };
      const Slab<kTokens> to = Slab<kTokens>::make(memory() + Plan::kSlab, Plan::kGathered, out.token_minor);
      const auto row = [&](int m) { return matrices.row(2 + i, m); };
      const auto clear = [](Sums<S>& sums, int) { sums = {}; };
      const auto flush = [&](int first, int count) {
        const int left = channels().count - 16 * first, width = left < 16 * count ? left : 16 * count;
        store_part<Plan::kGathered>(out, whole, {token(number), 16 * first, width, tokens(number)}, to);
      };
      if (out.token_minor != turned) turn(q);
      turned = out.token_minor;
      const float* z = problem_.states.z + state(i) * channels().padded;
      float factor[S::kBlocks][2];
      if (out.token_minor) {
        divisors<Order::kRight>(q, z, factor);
        float columns[S::kBlocks][2][2];
        XATTN_UNROLL
        for (int b = 0; b < S::kBlocks; ++b) {
          XATTN_UNROLL
          for (int h = 0; h < 2; ++h) {
            columns[b][h][0] = shuffle(factor[b][h], 8 * (lane() % 4));
            columns[b][h][1] = shuffle(factor[b][h], 8 * (lane() % 4) + 4);
          }
        }
        gather<Plan, true, Order::kRight>(
            q, channels(), to, row, clear,
            [&](const Sums<S>& sums, int, int b, int h, int r) {
              const float (&v)[4] = sums.v[b][h];
              return pack_bfloat16(v[2 * r] * columns[b][h][0], v[2 * r + 1] * columns[b][h][1]);
            },
            flush);
      } else {
        divisors<Order::kLeft>(q, z, factor);
        gather<Plan, false, Order::kLeft>(
            q, channels(), to, row, clear,
            [&](const Sums<S>& sums, int, int b, int h, int r) {
              const float (&v)[4] = sums.v[b][h];
              return pack_bfloat16(v[2 * r] * factor[b][r], v[2 * r + 1] * factor[b][r]);
            },
            flush);
      }
    }
  }

  // 1 / max(Z . q, eps) of tokens 16 b + g and 16 b + g + 8.
  template <Order kOrder>
  XATTN_DEVICE void divisors(const Fragments<S>& q, const float* z, float (&factor)[S::kBlocks][2]) const {
    struct alignas(8) Two {
      float x, y;
    };
    XATTN_UNROLL
    for (int b = 0; b < S::kBlocks; ++b) factor[b][0] = factor[b][1] = 0.0f;
    XATTN_UNROLL
    for (int k = 0; k < S::kTiles; ++k) {
      if (16 * k + 16 > S::kFrom && 16 * k >= opaque(channels().padded)) continue;
      XATTN_UNROLL
      for (int h = 0; h < 2; ++h) {
        if (16 * k + 8 * h >= S::kWidth) continue;
        const Two w = *reinterpret_cast<const Two*>(z + 16 * k + 8 * h + 2 * (lane() % 4));
        XATTN_UNROLL
        for (int b = 0; b < S::kBlocks; ++b) {
          XATTN_UNROLL
          for (int r = 0; r < 2; ++r) {
            const uint32_t pair = q.v[b][k][kOrder == Order::kLeft ? 2 * h + r : 2 * r + h];
            float& sum = factor[b][r];
            sum = fused_multiply_add(w.x, bits_float(pair << 16), sum);
            sum = fused_multiply_add(w.y, bits_float(pair & 0xFFFF0000u), sum);
          }
        }
      }
    }
    XATTN_UNROLL
    for (int b = 0; b < S::kBlocks; ++b) {
      XATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        float sum = factor[b][r];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        factor[b][r] = 1.0f / (sum < problem_.eps ? problem_.eps : sum);
      }
    }
  }

  const Arguments& args_;
  const BlockTargets& problem_;
  bool empty_;
  int work_;
};

template <class Plan>
XATTN_KERNEL(Plan::kThreads, Plan::kResident)
target_kernel(XATTN_PARAMETER Arguments args) {
  XATTN_KEEP_LOOP
  for (int work = block_index(); work < args.works; work += block_count()) Block<Plan>(args, work).run();
}

struct Kernel {
  int width, from;  // channels that it is for
  bool stream;
  ChainGeometry (*geometry)(int padded, int matrices, int limit);
  void (*start)(Arguments);
};
template <class Plan>
constexpr Kernel kernel_of() {
  return {Plan::S::kWidth, Plan::S::kFrom, Plan::kStream, chain_geometry<Plan>, target_kernel<Plan>};
}

const Kernel& choose(int64_t channels) {
  static const Kernel kKernels[] = {
      kernel_of<ChainPlan<Shape<24, 1, 32, Loops::kWhole>, 128, 4, 0>>(),
      kernel_of<ChainPlan<Shape<40, 25, 32, Loops::kWhole>, 128, 4, 0>>(),
      kernel_of<ChainPlan<Shape<48, 41, 32, Loops::kWhole>, 128, 3, 0>>(),
      kernel_of<ChainPlan<Shape<72, 49, 32, Loops::kWhole>, 384, 1, 0>>(),
      kernel_of<ChainPlan<Shape<96, 73, 32, Loops::kWhole>, 256, 1, 0>>(),
      kernel_of<ChainPlan<Shape<144, 129, 32, Loops::kWhole>, 256, 1, 3>>(),
      kernel_of<ChainPlan<Shape<192, 1, 16, Loops::kCut>, 256, 1, 3>>(),
      kernel_of<ChainPlan<Shape<256, 193, 16, Loops::kRowsCut>, 256, 1, 2>>(),
      kernel_of<ChainPlan<Shape<288, 273, 16, Loops::kWhole>, 256, 1, 2>>(),
      kernel_of<ChainPlan<Shape<384, 257, 16, Loops::kRowsCut>, 256, 1, 2>>(),
  };
  const int64_t padded = padded_channels(channels);
  const Kernel* last = nullptr;
  for (const Kernel& kernel : kKernels) {
    last = &kernel;
    if (channels > kernel.width || channels < kernel.from) continue;
    // What is kept must leave room for the tokens of a few warps.
    if (!kernel.stream && kernel.geometry(static_cast<int>(padded), 3, limits().shared_bytes).threads < 128) continue;
    return kernel;
  }
  return *last;
}

}  // namespace

int64_t chain_outputs(int64_t channels) {
  const Kernel& kernel = choose(channels);
  if (kernel.stream) return 1 << 20;
  int outputs = 1;
  const int padded = static_cast<int>(padded_channels(channels));
  const int threads = kernel.geometry(padded, 3, limits().shared_bytes).threads;
  while (outputs < 8 && kernel.geometry(padded, outputs + 3, limits().shared_bytes).threads == threads) ++outputs;
  return outputs;
}

void start_chain_targets(const BlockTargets& targets, int64_t outputs, const Table& table, Stream stream) {
  const Kernel& kernel = choose(targets.channels);
  const Limits device = limits();
  Arguments args{table, targets, {}, 0, 0, 0};
  args.geometry = kernel.geometry(static_cast<int>(padded_channels(targets.channels)), static_cast<int>(2 + outputs),
                                  device.shared_bytes);
  constexpr const char* kName = "block_targets";
  const size_t shared = static_cast<size_t>(args.geometry.shared);
  const int64_t resident =
      resident_blocks(reinterpret_cast<const void*>(kernel.start), kName, args.geometry.threads, shared);
  args.run = choose_tokens(targets.longest, targets.count * targets.batch, args.geometry.tile, resident,
                           kernel.stream ? 20 : 50);
  args.runs = (targets.longest + args.run - 1) / args.run;
  args.works = checked_works(args.runs * targets.batch * targets.count, kName);
  launch(kernel.start, kName, args.works, args.geometry.threads, shared, stream, args);
}

}  // namespace xattn::cuda
