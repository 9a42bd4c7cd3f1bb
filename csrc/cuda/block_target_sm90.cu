// Target pass of the cross-attention block for sm_90a: q = softplus(W_q2 relu(W_q1 x)), out = S q / max(Z . q, eps).
//
// Plan: a block goes through a run of tiles of target maps. Each of its warpgroups has 64 tokens as rows of
// products: x from shared memory, what follows from registers, since accumulators are laid out as left operands
// are. The right operands are slices of kColumns rows of W_q1, W_q2 and the states, with a row of biases or Z
// behind: slabs, which a thread of one more group fetches by bulk copies into a ring. Where all slabs of a map fit
// there, they stay for all its tiles; else they come again for every tile. Z . q is a sum of float32 products.
#if defined(XATTN_HAVE_SM90A) || defined(XATTN_TWIN)
#include <algorithm>

#include "block_sm90.h"
#include "maths.h"
#include "sm90_tile.h"

namespace xattn::cuda {
namespace {

constexpr int kMostSlots = 16;

// kColumns: of a product; kGroups: warpgroups of a block; kBlocks: of a multiprocessor.
template <int kColumns_, int kSlices_, int kGroups_, int kBlocks_>
struct Shape {
  static constexpr int kColumns = kColumns_, kSlices = kSlices_, kGroups = kGroups_, kBlocks = kBlocks_;
  static constexpr int kWidth = kColumns * kSlices, kDepth = (kWidth + 15) / 16 * 16, kSteps = kDepth / 16;
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kMatrix = kColumns * kDepth * 2;  // bytes of a slice
  static constexpr int kSlab = (kMatrix + kDepth * 4 + 127) / 128 * 128;
  static constexpr int kTile = kDepth * kWideTokens * 2;  // x
  static constexpr int kOutSteps = (kColumns + 15) / 16, kOut = kOutSteps * 16 * kWideTokens * 2;
  // What is left by the group that fetches is shared by the others.
  static constexpr int kFetching = 40;
  static constexpr int kRegisters =
      (65536 / (kBlocks * kThreads) / 8 * 8 * (kGroups + 1) - kFetching) / kGroups / 8 * 8;
  static constexpr int kBarriers = kMostSlots * 16;
};

struct Arguments {
  Table table;
  PackedBlock packed;
  BlockStates states;
  int64_t works;
  int batch, channels;
  float eps;
  int features, outputs, pairs, lists, items, first;  // in the table
  int slots, stages;                                  // of the ring; tiles of x
  bool stay;                                          // whether slabs stay for all tiles of an item and batch
  uint32_t zero;                                      // which the compiler does not know
};

// A tile of an item.
struct Work {
  int item, batch, token;
};

// Where the next slab lies, or goes; the parity of the phase in which it is there.
struct Cursor {
  int slot, parity;
  XATTN_DEVICE void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Goes through the works of a block, [begin, end).
template <class S>
class Walk {
 public:
  XATTN_DEVICE explicit Walk(const Arguments& args)
      : args_(args),
        begin_(static_cast<int>(args.works * block_index() / block_count())),
        end_(static_cast<int>(args.works * (block_index() + 1) / block_count())) {}
  XATTN_DEVICE int begin() const { return begin_; }
  XATTN_DEVICE int end() const { return end_; }
  // The first pair of an item; slot, weight and first output of a pair.
  XATTN_DEVICE int pair(int item) const { return number(args_.items + item); }
  XATTN_DEVICE int slot(int pair) const { return number(args_.pairs + 2 * pair); }
  XATTN_DEVICE int weight(int pair) const { return number(args_.pairs + 2 * pair + 1); }
  XATTN_DEVICE int result(int pair) const { return number(args_.lists + pair); }
  XATTN_DEVICE int number(int i) const { return static_cast<int>(args_.table[i]); }
  // Works are asked for in order.
  XATTN_DEVICE Work at(int work) {
    while (work >= first(item_ + 1)) ++item_;
    const int begin = first(item_), tiles = (first(item_ + 1) - begin) / args_.batch;
    return {item_, (work - begin) / tiles, (work - begin) % tiles * S::kGroups * kWideTokens};
  }

 private:
  XATTN_DEVICE int first(int item) const { return number(args_.first + item); }

  const Arguments& args_;
  int begin_, end_, item_ = 0;
};

XATTN_DEVICE bool same_slabs(const Work& a, const Work& b) { return a.item == b.item && a.batch == b.batch; }

template <class S>
struct Memory {
  XATTN_DEVICE explicit Memory(const Arguments& args) : args_(args) {}
  XATTN_DEVICE Mbarrier* full(int slot) const { return reinterpret_cast<Mbarrier*>(shared_memory()) + slot; }
  XATTN_DEVICE Mbarrier* empty(int slot) const { return full(args_.slots + slot); }
  XATTN_DEVICE char* slab(int slot) const { return shared_memory() + S::kBarriers + slot * S::kSlab; }
  XATTN_DEVICE char* tile(int stage) const {
    return slab(args_.slots) + (warpgroup() * args_.stages + stage) * S::kTile;
  }
  XATTN_DEVICE char* out() const {
    return slab(args_.slots) + S::kGroups * args_.stages * S::kTile + warpgroup() * S::kOut;
  }

 private:
  const Arguments& args_;
};

// The warp that fetches slabs, by one thread.
template <class S>
class Producer {
 public:
  XATTN_DEVICE explicit Producer(const Arguments& args) : args_(args), memory_(args), walk_(args) {}

  XATTN_DEVICE void run() {
    Work last{-1, -1, 0};
    XATTN_KEEP_LOOP
    for (int i = walk_.begin(); i < walk_.end(); ++i) {
      const Work work = walk_.at(i);
      if (args_.stay && same_slabs(work, last)) continue;
      last = work;
      XATTN_KEEP_LOOP
      for (int pair = walk_.pair(work.item); pair < walk_.pair(work.item + 1); ++pair) {
        fetch_matrix(walk_.weight(pair), kQuery1);
        fetch_matrix(walk_.weight(pair), kQuery2);
        XATTN_KEEP_LOOP
        for (int i = walk_.result(pair); i < walk_.result(pair + 1); ++i)
          fetch_state(static_cast<int64_t>(walk_.number(i)) * args_.batch + work.batch);
      }
    }
  }

 private:
  static constexpr int64_t kMatrixBytes = int64_t(S::kDepth) * S::kDepth * 2;

  XATTN_DEVICE void fetch_matrix(int weight, int projection) {
    const int64_t number = static_cast<int64_t>(weight) * kProjections + projection;
    const char* matrix = args_.packed.matrices + number * kMatrixBytes;
    const float* bias = args_.packed.biases + number * S::kDepth;
    XATTN_KEEP_LOOP
    for (int slice = 0; slice < S::kSlices; ++slice)
      fetch(matrix + slice * S::kMatrix, bias + slice * S::kColumns, S::kColumns * 4);
  }
  XATTN_DEVICE void fetch_state(int64_t number) {
    XATTN_KEEP_LOOP
    for (int slice = 0; slice < S::kSlices; ++slice)
      fetch(args_.states.s + number * kMatrixBytes + slice * S::kMatrix, args_.states.z + number * S::kDepth,
            slice == 0 ? S::kDepth * 4 : 0);
  }
  XATTN_DEVICE void fetch(const char* matrix, const float* row, int row_bytes) {
    const int slot = cursor_.slot;
    wait_phase(memory_.empty(slot), cursor_.parity ^ 1);
    arrive_expecting(memory_.full(slot), S::kMatrix + row_bytes);
    copy_bulk(memory_.slab(slot), matrix, S::kMatrix, memory_.full(slot));
    if (row_bytes > 0) copy_bulk(memory_.slab(slot) + S::kMatrix, row, row_bytes, memory_.full(slot));
    cursor_.advance(args_.slots);
  }

  const Arguments& args_;
  const Memory<S> memory_;
  Walk<S> walk_;
  Cursor cursor_{0, 0};
};

template <class S>
class Consumer {
 public:
  XATTN_DEVICE explicit Consumer(const Arguments& args) : args_(args), memory_(args), walk_(args), ahead_(args) {}

  XATTN_DEVICE void run() {
    if (walk_.begin() < walk_.end()) load(walk_.begin(), 0);
    XATTN_KEEP_LOOP
    for (int i = walk_.begin(); i < walk_.end(); ++i) {
      work_ = walk_.at(i);
      const int stage = (i - walk_.begin()) % args_.stages;
      wait_copies<0>();
      fence_async();
      sync_some(group_barrier(), kWarpgroup);
      if (args_.stages == 2) load(i + 1, stage ^ 1);
      leave_ = true;
      if (args_.stay && i + 1 < walk_.end()) {
        Walk<S> next = walk_;
        leave_ = !same_slabs(work_, next.at(i + 1));
      }
      const View view = args_.table.view(args_.features, walk_.slot(walk_.pair(work_.item)));
      const CoreTile x = core_tile(memory_.tile(stage), is_token_minor(view), S::kDepth);
      cursor_ = base_;
      const int end = walk_.pair(work_.item + 1);
      XATTN_KEEP_LOOP
      for (int pair = walk_.pair(work_.item); pair < end; ++pair) {
        Features h, q;
        project_tile(h, x);
        if (args_.stages == 1 && pair + 1 == end) {
          sync_some(group_barrier(), kWarpgroup);
          load(i + 1, 0);
        }
        project(q, h);
        XATTN_KEEP_LOOP
        for (int i = walk_.result(pair); i < walk_.result(pair + 1); ++i) attend(q, walk_.number(i));
      }
      if (leave_) base_ = cursor_;
    }
  }

 private:
  using Sums = float[S::kColumns / 2];
  using Features = WideFragments<S::kSteps>;

  static XATTN_DEVICE int group_barrier() { return 1 + warpgroup(); }

  XATTN_DEVICE void load(int i, int stage) {
    if (i < walk_.end()) {
      const Work work = ahead_.at(i);
      const View view = args_.table.view(args_.features, walk_.slot(walk_.pair(work.item)));
      const int64_t token = work.token + warpgroup() * kWideTokens, left = view.tokens - token;
      const int tokens = left < 0 ? 0 : left < kWideTokens ? static_cast<int>(left) : kWideTokens;
      load_cores(view, access<BFloat16>(view, Dtype::kBFloat16),
                 {work.batch, 0, tokens > 0 ? token : 0, args_.channels, tokens},
                 core_tile(memory_.tile(stage), is_token_minor(view), S::kDepth));
    }
    commit_copies();
  }

  XATTN_DEVICE const char* slab() const { return memory_.slab(cursor_.slot) + nothing_; }
  XATTN_DEVICE const float* row() const { return reinterpret_cast<const float*>(slab() + S::kMatrix); }
  XATTN_DEVICE void await_slab() const { wait_phase(memory_.full(cursor_.slot), cursor_.parity); }
  XATTN_DEVICE void leave_slab() {
    if (leave_ && lane() == 0) arrive(memory_.empty(cursor_.slot));
    cursor_.advance(args_.slots);
  }

  // The address of the next slab depends on the features of this one: else the compiler keeps the sums of several
  // slices, and rounds them all at the end, with more registers than there are.
  XATTN_DEVICE void finish_slice(uint32_t features) {
    if (S::kSlices > 2) nothing_ = features & args_.zero;
  }

  // h = relu(W_q1 x), of the next slabs.
  template <int kSlice = 0>
  XATTN_DEVICE void project_tile(Features& h, const CoreTile& x) {
    Sums sums;
    await_slab();
    start_with(sums, row());
    multiply_tile<S::kSteps>(sums, x, slab());
    finish_products(sums);
    leave_slab();
    finish_slice(
        h.template set<kSlice * S::kColumns / 8>(sums, [](float a, float b) { return pack_bfloat16_relu(a, b); }));
    if constexpr (kSlice + 1 < S::kSlices)
      project_tile<kSlice + 1>(h, x);
    else
      h.template clear_from<S::kWidth>(args_.channels);
  }
  // q = softplus(W_q2 h).
  template <int kSlice = 0>
  XATTN_DEVICE void project(Features& q, Features& h) {
    Sums sums;
    await_slab();
    start_with(sums, row());
    multiply_fragments(sums, h, slab(), true);
    finish_products(sums);
    leave_slab();
    finish_slice(q.template set<kSlice * S::kColumns / 8>(
        sums, [](float a, float b) { return pack_bfloat16(softplus<false>(a), softplus<false>(b)); }));
    if constexpr (kSlice + 1 < S::kSlices)
      project<kSlice + 1>(q, h);
    else
      q.template clear_from<S::kWidth>(args_.channels);
  }

  // 1 / max(Z . q, eps) of this lane's two rows.
  XATTN_DEVICE void inverses(float (&inverse)[2], const Features& q, const float* z) const {
    struct alignas(8) Pair {
      float x, y;
    };
    inverse[0] = inverse[1] = 0.0f;
    XATTN_UNROLL
    for (int i = 0; i < 2 * S::kSteps; ++i) {
      const Pair pair = *reinterpret_cast<const Pair*>(z + 8 * i + 2 * (lane() % 4));
      XATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const uint32_t both = q.v[i / 2][i % 2 * 2 + r];
        inverse[r] = fused_multiply_add(pair.x, bits_float(both << 16), inverse[r]);
        inverse[r] = fused_multiply_add(pair.y, bits_float(both & 0xFFFF0000u), inverse[r]);
      }
    }
    XATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      inverse[r] += shuffle_xor(inverse[r], 1);
      inverse[r] += shuffle_xor(inverse[r], 2);
      inverse[r] = 1.0f / (inverse[r] < args_.eps ? args_.eps : inverse[r]);
    }
  }

  XATTN_DEVICE void attend(Features& q, int output) {
    const View view = args_.table.view(args_.outputs, output);
    const Access how = access<BFloat16>(view, Dtype::kBFloat16);
    const int64_t token = work_.token + warpgroup() * kWideTokens, left = view.tokens - token;
    const int tokens = left < 0 ? 0 : left < kWideTokens ? static_cast<int>(left) : kWideTokens;
    const CoreTile staged = core_tile(memory_.out(), how.token_minor, S::kOutSteps * 16);
    float inverse[2];
    XATTN_KEEP_LOOP
    for (int slice = 0; slice < S::kSlices; ++slice) {
      Sums sums;
      await_slab();
      multiply_fragments(sums, q, slab(), false);
      if (slice == 0) inverses(inverse, q, row());
      finish_products(sums);
      leave_slab();
      XATTN_UNROLL
      for (int i = 0; i < S::kColumns / 2; ++i) sums[i] *= inverse[i / 2 % 2];
      WideFragments<S::kOutSteps> out;
      out.template set<0>(sums, [](float a, float b) { return pack_bfloat16(a, b); });
      out.template clear_from<S::kColumns>(S::kColumns);
      out.store(staged);
      sync_some(group_barrier(), kWarpgroup);
      const int channel = slice * S::kColumns, channels = args_.channels - channel;
      store_cores(view, how, {work_.batch, channel, token, channels < S::kColumns ? channels : S::kColumns, tokens},
                  staged);
      sync_some(group_barrier(), kWarpgroup);
    }
  }

  const Arguments& args_;
  const Memory<S> memory_;
  Walk<S> walk_, ahead_;
  Work work_{};
  Cursor base_{0, 0}, cursor_{0, 0};
  bool leave_ = true;
  uint32_t nothing_ = 0;
};

template <class S>
XATTN_KERNEL(S::kThreads, S::kBlocks)
target_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() == 0) {
    const Memory<S> memory(args);
    for (int slot = 0; slot < args.slots; ++slot) {
      start_mbarrier(memory.full(slot), 1);
      start_mbarrier(memory.empty(slot), S::kGroups * 4);
    }
  }
  sync_threads();
  // By one lane's value for all, which tells the compiler that warps stay together.
  if (shuffle(warpgroup(), 0) == S::kGroups) {
    give_registers<S::kFetching>();
    if (thread_of_group() == 0) Producer<S>(args).run();
  } else {
    take_registers<S::kRegisters>();
    Consumer<S>(args).run();
  }
}

template <class Body>
bool with_shape(int64_t channels, const Body& body) {
  switch ((channels + 7) / 8 * 8) {
    case 40:
      body(Shape<40, 1, 2, 2>{});
      return true;
    case 48:
      body(Shape<48, 1, 2, 2>{});
      return true;
    case 72:
      body(Shape<72, 1, 3, 1>{});
      return true;
    case 96:
      body(Shape<96, 1, 2, 1>{});
      return true;
    case 144:
      body(Shape<144, 1, 2, 1>{});
      return true;
    case 192:
      body(Shape<96, 2, 2, 1>{});
      return true;
    case 288:
      body(Shape<72, 4, 2, 1>{});
      return true;
    default:
      return false;
  }
}

template <class S>
int shared_bytes(int slots, int stages) {
  return S::kBarriers + slots * S::kSlab + S::kGroups * (stages * S::kTile + S::kOut);
}

// Slabs that fit a block of `bytes`.
template <class S>
int most_slots(int bytes, int stages) {
  const int slots = (bytes - shared_bytes<S>(0, stages)) / S::kSlab;
  return slots < kMostSlots ? slots : kMostSlots;
}

using Pair = std::pair<int64_t, int64_t>;

// Slots as items, or pairs as items.
template <class S>
void make_items(const BlockProblem& problem, const std::vector<Pair>& targets, bool whole, TargetPlan& plan) {
  plan.items = {0};
  plan.first = {0};
  for (size_t begin = 0, end; begin < targets.size(); begin = end) {
    const int64_t slot = targets[begin].first;
    for (end = begin + 1; whole && end < targets.size() && targets[end].first == slot;) ++end;
    constexpr int64_t kTokens = S::kGroups * kWideTokens;
    plan.items.push_back(static_cast<int64_t>(end));
    plan.first.push_back(plan.first.back() + (problem.features[slot].tokens + kTokens - 1) / kTokens * problem.batch);
  }
}

// Slabs of the largest item.
template <class S>
int64_t most_slabs(const std::vector<std::vector<int64_t>>& outputs, const TargetPlan& plan) {
  int64_t most = 0;
  for (size_t i = 0; i + 1 < plan.items.size(); ++i) {
    int64_t slabs = 0;
    for (int64_t pair = plan.items[i]; pair < plan.items[i + 1]; ++pair)
      slabs += (2 + static_cast<int64_t>(outputs[static_cast<size_t>(pair)].size())) * S::kSlices;
    most = std::max(most, slabs);
  }
  return most;
}

// Slabs that stay are best, of a whole slot first: it is read once for all its pairs. Else pairs are items, which
// gives more works, with as many slabs on their way as there is room for.
template <class S>
TargetPlan make_plan(const BlockProblem& problem, const std::vector<Pair>& targets,
                     const std::vector<std::vector<int64_t>>& outputs, const Limits& device) {
  TargetPlan plan{};
  for (const bool whole : {true, false}) {
    make_items<S>(problem, targets, whole, plan);
    if (whole && plan.first.back() < 2 * S::kBlocks * device.processors) continue;
    const int64_t slabs = most_slabs<S>(outputs, plan);
    for (int blocks = S::kBlocks; blocks > 0; --blocks) {
      for (plan.stages = 2; plan.stages > 0; --plan.stages) {
        if (slabs > most_slots<S>((device.shared_bytes + 1024) / blocks - 1024, plan.stages)) continue;
        plan.slots = static_cast<int>(slabs);
        plan.stay = true;
        plan.shared = shared_bytes<S>(plan.slots, plan.stages);
        return plan;
      }
    }
  }
  plan.stages = most_slots<S>(device.shared_bytes, 2) > 2 ? 2 : 1;
  plan.slots = most_slots<S>(device.shared_bytes, plan.stages);
  plan.stay = false;
  plan.shared = shared_bytes<S>(plan.slots, plan.stages);
  return plan;
}

}  // namespace

bool targets_sm90_fit(int64_t channels, const Limits& device) {
  bool fit = false;
  with_shape(channels, [&](auto shape) { fit = most_slots<decltype(shape)>(device.shared_bytes, 1) >= 2; });
  return fit;
}

TargetPlan plan_targets_sm90(const BlockProblem& problem, const std::vector<Pair>& targets,
                             const std::vector<std::vector<int64_t>>& outputs, const Limits& device) {
  TargetPlan plan{};
  with_shape(problem.channels,
             [&](auto shape) { plan = make_plan<decltype(shape)>(problem, targets, outputs, device); });
  return plan;
}

void start_targets_sm90(const BlockTargets& targets, const TargetPlan& plan, int items, int first, const Table& table,
                        Stream stream) {
  const Arguments args{table,
                       targets.packed,
                       targets.states,
                       plan.first.back(),
                       static_cast<int>(targets.batch),
                       static_cast<int>(targets.channels),
                       targets.eps,
                       targets.features,
                       targets.outputs,
                       targets.pairs,
                       targets.lists,
                       items,
                       first,
                       plan.slots,
                       plan.stages,
                       plan.stay,
                       0};
  with_shape(targets.channels, [&](auto shape) {
    using S = decltype(shape);
    launch(target_kernel<S>, "block_targets_sm90", args.works, S::kThreads, static_cast<size_t>(plan.shared), stream,
           args);
  });
}

}  // namespace xattn::cuda
#endif
