// Small kernels that try one thing each, right and wrong ones.
#include "cuda/launch.h"
#include "selftest.h"

namespace xattn::cuda {
namespace {

struct Arguments {
  const void *a, *b;
  void* d;
  int64_t number, works;
  template <class T>
  XATTN_DEVICE const T* a_as() const {
    return static_cast<const T*>(a);
  }
  template <class T>
  XATTN_DEVICE const T* b_as() const {
    return static_cast<const T*>(b);
  }
  template <class T>
  XATTN_DEVICE T* d_as() const {
    return static_cast<T*>(d);
  }
};

template <class T>
XATTN_DEVICE T* shared() {
  return reinterpret_cast<T*>(shared_memory());
}

// Who a thread is: (works, threads, 5).
XATTN_KERNEL(64, 1) names_kernel(XATTN_PARAMETER Arguments args) {
  for (int64_t work = block_index(); work < args.works; work += block_count()) {
    int* d = args.d_as<int>() + (work * thread_count() + thread_index()) * 5;
    d[0] = thread_index();
    d[1] = lane();
    d[2] = warp();
    d[3] = block_index();
    d[4] = block_count() * 100 + warp_count();
  }
}

// In which order threads come: d[0] counts, the rest are their numbers.
XATTN_KERNEL(64, 1) order_kernel(XATTN_PARAMETER Arguments args) {
  int* d = args.d_as<int>();
  for (int i = 0; i < args.number; i++) {
    sync_warp();
    d[++d[0]] = block_index() * 1000 + thread_index();
  }
}

XATTN_KERNEL(32, 1) shuffle_xor_kernel(XATTN_PARAMETER Arguments args) {
  const int i = thread_index(), mask = static_cast<int>(args.number);
  args.d_as<double>()[i] = shuffle_xor(args.a_as<double>()[i], mask);
  args.d_as<double>()[32 + i] = shuffle_xor(static_cast<float>(args.a_as<double>()[i]), mask);
}
XATTN_KERNEL(32, 1) shuffle_kernel(XATTN_PARAMETER Arguments args) {
  const int i = thread_index();
  args.d_as<double>()[i] = shuffle(args.a_as<double>()[i], args.b_as<int>()[i]);
}
XATTN_KERNEL(64, 1) any_kernel(XATTN_PARAMETER Arguments args) {
  args.d_as<int>()[thread_index()] = any(thread_index() == args.number) ? 1 : 0;
}

XATTN_KERNEL(32, 1) load_kernel(XATTN_PARAMETER Arguments args) {
  uint16_t* rows = shared<uint16_t>();
  for (int i = 0; i < 8; i++) rows[thread_index() * 8 + i] = args.a_as<uint16_t>()[thread_index() * 8 + i];
  sync_threads();
  const void* row = shared_memory() + thread_index() * 16 + args.number / 2;
  uint32_t r[4];
  if (args.number % 2 == 0) {
    load_matrices(r, row);
  } else {
    load_matrices_transposed(r, row);
  }
  for (int i = 0; i < 4; i++) args.d_as<uint32_t>()[thread_index() * 4 + i] = r[i];
}

// Rows of a matrix `number` bytes apart.
XATTN_KERNEL(32, 1) stride_kernel(XATTN_PARAMETER Arguments args) {
  uint32_t r[4];
  load_matrices(r, shared_memory() + thread_index() % 8 * args.number + thread_index() / 8 * 16);
  args.d_as<uint32_t>()[thread_index()] = r[0];
}

// Fragments come and go as they are: lane l has a[l][4], b[l][2], d[l][4].
XATTN_KERNEL(32, 1) multiply_kernel(XATTN_PARAMETER Arguments args) {
  const int i = thread_index();
  uint32_t a[4], b[2];
  float d[4];
  for (int j = 0; j < 4; j++) a[j] = args.a_as<uint32_t>()[i * 4 + j];
  for (int j = 0; j < 2; j++) b[j] = args.b_as<uint32_t>()[i * 2 + j];
  for (int j = 0; j < 4; j++) d[j] = args.d_as<float>()[i * 4 + j];
  if (args.number == 16) {
    multiply_bfloat16(d, a, b);
  } else {
    multiply_tf32(d, a, b);
  }
  for (int j = 0; j < 4; j++) args.d_as<float>()[i * 4 + j] = d[j];
}

// d[i] = f(a[i]) for i < number, as 32 bits.
template <class F>
XATTN_DEVICE void map(const Arguments& args, const F& f) {
  for (int64_t i = thread_index(); i < args.number; i += thread_count()) {
    args.d_as<uint32_t>()[i] = f(args.a_as<float>()[i]);
  }
}
XATTN_KERNEL(32, 1) bfloat16_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return pack_bfloat16(x, -x); });
}
XATTN_KERNEL(32, 1) bfloat16_relu_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return pack_bfloat16_relu(x, -x); });
}
XATTN_KERNEL(32, 1) float16_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return static_cast<uint32_t>(float_to_float16(x)); });
}
XATTN_KERNEL(32, 1) tf32_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return float_to_tf32(x); });
}
XATTN_KERNEL(32, 1) exp2_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return float_bits(exp2_approximate(x)); });
}
XATTN_KERNEL(32, 1) log2_kernel(XATTN_PARAMETER Arguments args) {
  map(args, [](float x) { return float_bits(log2_approximate(x)); });
}
XATTN_KERNEL(32, 1) from_halves_kernel(XATTN_PARAMETER Arguments args) {
  for (int64_t i = thread_index(); i < args.number; i += thread_count()) {
    args.d_as<float>()[2 * i] = bfloat16_to_float(args.a_as<uint16_t>()[i]);
    args.d_as<float>()[2 * i + 1] = float16_to_float(args.a_as<uint16_t>()[i]);
  }
}

// What shared memory holds at first.
XATTN_KERNEL(32, 1) garbage_kernel(XATTN_PARAMETER Arguments args) {
  for (int64_t i = thread_index(); i < args.number; i += thread_count()) {
    args.d_as<char>()[i] = shared_memory()[i];
  }
}

// d[i] = a[next thread's i], by shared memory.
template <bool kBarrier>
XATTN_DEVICE void rotate(const Arguments& args) {
  float* memory = shared<float>();
  const int i = thread_index();
  memory[i] = args.a_as<float>()[i];
  if (kBarrier) sync_threads();
  args.d_as<float>()[i] = memory[(i + 1) % thread_count()];
}
XATTN_KERNEL(128, 1) rotate_kernel(XATTN_PARAMETER Arguments args) { rotate<true>(args); }
XATTN_KERNEL(128, 1) rotate_early_kernel(XATTN_PARAMETER Arguments args) { rotate<false>(args); }
// The same again in the same memory, which needs a second barrier.
template <bool kBarrier>
XATTN_DEVICE void rotate_twice(const Arguments& args) {
  float* memory = shared<float>();
  const int i = thread_index();
  for (int round = 0; round < 2; round++) {
    memory[i] = args.a_as<float>()[round * thread_count() + i];
    sync_threads();
    args.d_as<float>()[round * thread_count() + i] = memory[(i + 1) % thread_count()];
    if (kBarrier) sync_threads();
  }
}
XATTN_KERNEL(128, 1) rotate_twice_kernel(XATTN_PARAMETER Arguments args) { rotate_twice<true>(args); }
XATTN_KERNEL(128, 1) rotate_twice_early_kernel(XATTN_PARAMETER Arguments args) { rotate_twice<false>(args); }
// Within a warp.
template <bool kBarrier>
XATTN_DEVICE void rotate_warp(const Arguments& args) {
  float* memory = shared<float>();
  const int i = thread_index();
  memory[i] = args.a_as<float>()[i];
  if (kBarrier) sync_warp();
  args.d_as<float>()[i] = memory[(i + 1) % kWarp];
}
XATTN_KERNEL(32, 1) rotate_warp_kernel(XATTN_PARAMETER Arguments args) { rotate_warp<true>(args); }
XATTN_KERNEL(32, 1) rotate_warp_early_kernel(XATTN_PARAMETER Arguments args) { rotate_warp<false>(args); }

// Lanes that only a shuffle keeps apart, which orders nothing in memory.
XATTN_KERNEL(32, 1) rotate_shuffled_kernel(XATTN_PARAMETER Arguments args) {
  float* memory = shared<float>();
  const int i = thread_index();
  memory[i] = args.a_as<float>()[i];
  const int next = shuffle_xor((i + 31) % 32, 0);
  args.d_as<float>()[i] = memory[next];
}
// Many read and nobody writes; every thread uses what is its own; barriers of warps are enough for warps.
XATTN_KERNEL(64, 1) no_race_kernel(XATTN_PARAMETER Arguments args) {
  float* memory = shared<float>();
  const int i = thread_index(), first = warp() * kWarp;
  if (i == 0) memory[64] = args.a_as<float>()[0];
  for (int round = 0; round < 3; round++) {
    memory[i] = args.a_as<float>()[i];
    memory[i] += 1.0f;
    sync_warp();
    float sum = 0.0f;
    for (int j = 0; j < kWarp; j++) sum += memory[first + j];
    sync_warp();
    args.d_as<float>()[i] = sum;
  }
  sync_threads();
  args.d_as<float>()[i] += memory[64];
}
// A matrix is loaded by others than have written it; a buffer is filled while others read it.
XATTN_KERNEL(64, 1) load_early_kernel(XATTN_PARAMETER Arguments args) {
  shared<float>()[thread_index()] = 0.0f;
  uint32_t r[4];
  load_matrices(r, shared_memory() + thread_index() % 8 * 16);
  args.d_as<uint32_t>()[thread_index()] = r[0];
}
XATTN_KERNEL(64, 1) copy_early_kernel(XATTN_PARAMETER Arguments args) {
  float* mine = shared<float>() + 4 * thread_index();
  mine[0] = args.a_as<float>()[0];
  sync_threads();
  args.d_as<float>()[thread_index()] = shared<float>()[(4 * thread_index() + 4) % 256];
  copy_async(mine, args.a_as<float>());
  commit_copies();
  wait_copies<0>();
}
// A barrier before a wait is none after it.
XATTN_KERNEL(64, 1) wait_late_kernel(XATTN_PARAMETER Arguments args) {
  copy_async(shared<float>() + 4 * thread_index(), args.a_as<float>());
  commit_copies();
  sync_threads();
  wait_copies<0>();
  args.d_as<float>()[thread_index()] = shared<float>()[(4 * thread_index() + 4) % 256];
}

// Each thread copies kSize bytes of `a`, `number` of them, and gives them back.
template <int kSize>
XATTN_DEVICE void copy(const Arguments& args, int skew_to, int skew_from) {
  char* to = shared_memory() + thread_index() * kSize;
  copy_async<kSize>(to + skew_to, args.a_as<char>() + thread_index() * kSize + skew_from,
                    static_cast<int>(args.number));
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < kSize; i++) args.d_as<char>()[thread_index() * kSize + i] = to[i];
}
XATTN_KERNEL(32, 1) copy4_kernel(XATTN_PARAMETER Arguments args) { copy<4>(args, 0, 0); }
XATTN_KERNEL(32, 1) copy8_kernel(XATTN_PARAMETER Arguments args) { copy<8>(args, 0, 0); }
XATTN_KERNEL(32, 1) copy16_kernel(XATTN_PARAMETER Arguments args) { copy<16>(args, 0, 0); }
XATTN_KERNEL(32, 1) copy_skew_to_kernel(XATTN_PARAMETER Arguments args) { copy<16>(args, 4, 0); }
XATTN_KERNEL(32, 1) copy_skew_from_kernel(XATTN_PARAMETER Arguments args) { copy<16>(args, 0, 8); }
XATTN_KERNEL(32, 1) copy_from_shared_kernel(XATTN_PARAMETER Arguments) {
  copy_async(shared_memory(), shared_memory() + 16);
  commit_copies();
  wait_copies<0>();
}

// Four groups of one copy each, read after wait_copies<kPending>: d is (thread, group).
template <int kPending>
XATTN_DEVICE void groups(const Arguments& args) {
  float* mine = shared<float>() + thread_index() * 16;
  for (int i = 0; i < 4; i++) {
    copy_async(mine + 4 * i, args.a_as<float>() + (thread_index() * 4 + i) * 4);
    commit_copies();
  }
  wait_copies<kPending>();
  for (int i = 0; i < 4; i++) args.d_as<float>()[thread_index() * 4 + i] = mine[4 * i];
  wait_copies<0>();
}
XATTN_KERNEL(32, 1) groups0_kernel(XATTN_PARAMETER Arguments args) { groups<0>(args); }
XATTN_KERNEL(32, 1) groups1_kernel(XATTN_PARAMETER Arguments args) { groups<1>(args); }
XATTN_KERNEL(32, 1) groups3_kernel(XATTN_PARAMETER Arguments args) { groups<3>(args); }
XATTN_KERNEL(32, 1) not_waited_kernel(XATTN_PARAMETER Arguments args) {
  copy_async(shared_memory() + thread_index() * 16, args.a_as<float>() + thread_index() * 4);
  commit_copies();
}
XATTN_KERNEL(32, 1) not_committed_kernel(XATTN_PARAMETER Arguments args) {
  copy_async(shared_memory() + thread_index() * 16, args.a_as<float>() + thread_index() * 4);
  wait_copies<0>();
}

// Threads that do not come together.
XATTN_KERNEL(64, 1) return_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() == args.number) return;
  sync_threads();
}
XATTN_KERNEL(64, 1) return_from_warp_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() == args.number) return;
  sync_warp();
}
XATTN_KERNEL(64, 1) two_barriers_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() < args.number) {
    sync_threads();
  } else {
    sync_threads();
  }
}
XATTN_KERNEL(64, 1) two_places_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() < args.number) {
    sync_warp();
  } else {
    sync_warp();
  }
}
XATTN_KERNEL(64, 1) two_collectives_kernel(XATTN_PARAMETER Arguments args) {
  thread_index() < args.number ? sync_warp() : static_cast<void>(any(true));
}
XATTN_KERNEL(64, 1) warp_and_block_kernel(XATTN_PARAMETER Arguments args) {
  if (thread_index() < args.number) sync_warp();
  sync_threads();
}
XATTN_KERNEL(32, 1) two_masks_kernel(XATTN_PARAMETER Arguments args) {
  args.d_as<int>()[0] = shuffle_xor(1, thread_index() < args.number ? 1 : 2);
}

// Reads or writes one float beyond or before.
XATTN_KERNEL(32, 1) read_global_kernel(XATTN_PARAMETER Arguments args) {
  args.d_as<float>()[thread_index()] = args.a_as<float>()[args.number];
}
XATTN_KERNEL(32, 1) write_global_kernel(XATTN_PARAMETER Arguments args) { args.d_as<float>()[args.number] = 1.0f; }
XATTN_KERNEL(32, 1) read_shared_kernel(XATTN_PARAMETER Arguments args) {
  args.d_as<float>()[thread_index()] = shared<float>()[args.number];
}
XATTN_KERNEL(32, 1) write_shared_kernel(XATTN_PARAMETER Arguments args) { shared<float>()[args.number] = 1.0f; }

// Eight bytes at once from the float `number`.
XATTN_KERNEL(32, 1) read_double_kernel(XATTN_PARAMETER Arguments args) {
  args.d_as<double>()[0] = *reinterpret_cast<const double*>(args.a_as<float>() + args.number);
}
XATTN_KERNEL(32, 1) write_double_kernel(XATTN_PARAMETER Arguments args) {
  *reinterpret_cast<double*>(args.d_as<float>() + args.number) = args.a_as<double>()[0];
}

// Takes `number` times some of a thread's stack.
int deep(int64_t number, const volatile int* above) {
  volatile int here[256];
  here[number % 256] = above[number % 256];
  return number > 0 ? deep(number - 1, here) + here[number % 256] : 0;
}
XATTN_KERNEL(32, 1) deep_kernel(XATTN_PARAMETER Arguments args) {
  const volatile int top[256] = {};
  args.d_as<int>()[thread_index()] = deep(args.number, top);
}

// For how long they take.
XATTN_KERNEL(32, 1) products_kernel(XATTN_PARAMETER Arguments args) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  for (int64_t i = 0; i < args.number; i++) multiply_bfloat16(d, a, b);
  args.d_as<float>()[thread_index()] = d[0];
}
XATTN_KERNEL(128, 1) barriers_kernel(XATTN_PARAMETER Arguments args) {
  for (int64_t i = 0; i < args.number; i++) sync_threads();
}

struct Kernel {
  const char* name;
  void (*kernel)(Arguments);
};
#define KERNEL(name) {#name, name##_kernel}
const Kernel kKernels[] = {
    KERNEL(names),
    KERNEL(order),
    KERNEL(shuffle_xor),
    KERNEL(shuffle),
    KERNEL(any),
    KERNEL(load),
    KERNEL(stride),
    KERNEL(multiply),
    KERNEL(bfloat16),
    KERNEL(bfloat16_relu),
    KERNEL(float16),
    KERNEL(tf32),
    KERNEL(exp2),
    KERNEL(log2),
    KERNEL(from_halves),
    KERNEL(garbage),
    KERNEL(rotate),
    KERNEL(rotate_early),
    KERNEL(rotate_twice),
    KERNEL(rotate_twice_early),
    KERNEL(rotate_warp),
    KERNEL(rotate_warp_early),
    KERNEL(rotate_shuffled),
    KERNEL(no_race),
    KERNEL(load_early),
    KERNEL(copy_early),
    KERNEL(wait_late),
    KERNEL(copy4),
    KERNEL(copy8),
    KERNEL(copy16),
    KERNEL(copy_skew_to),
    KERNEL(copy_skew_from),
    KERNEL(copy_from_shared),
    KERNEL(groups0),
    KERNEL(groups1),
    KERNEL(groups3),
    KERNEL(not_waited),
    KERNEL(not_committed),
    KERNEL(return),
    KERNEL(return_from_warp),
    KERNEL(two_barriers),
    KERNEL(two_places),
    KERNEL(two_collectives),
    KERNEL(warp_and_block),
    KERNEL(two_masks),
    KERNEL(read_global),
    KERNEL(write_global),
    KERNEL(read_shared),
    KERNEL(write_shared),
    KERNEL(read_double),
    KERNEL(write_double),
    KERNEL(deep),
    KERNEL(products),
    KERNEL(barriers),
};
#undef KERNEL

}  // namespace

void selftest(const std::string& name, const void* a, const void* b, void* d, int64_t number, int64_t works,
              int threads, size_t shared) {
  for (const Kernel& known : kKernels) {
    if (name == known.name) {
      return launch(known.kernel, known.name, works, threads, shared, nullptr, Arguments{a, b, d, number, works});
    }
  }
  throw std::runtime_error("selftest: no kernel named " + name);
}

}  // namespace xattn::cuda
