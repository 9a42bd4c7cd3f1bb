// The names of cuda/device.h and cuda/launch.h for the host's compiler.
//
// The threads of a block are fibers of one thread of the host, its blocks run one after another, and a
// launch returns when all are done. Who goes next is drawn by seed, shared memory starts as garbage,
// copies land late or at once, and what a GPU would hang on or leave undefined is an error: it names
// the call by the place where it stands in the source.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#define XATTN_DEVICE inline
#define XATTN_BOTH inline
#define XATTN_KERNEL(threads, blocks) void
#define XATTN_PARAMETER const
#define XATTN_UNROLL
#define XATTN_KEEP_LOOP

// The last parameters of everything that threads do together.
#define XATTN_TWIN_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace xattn::cuda {

constexpr int kWarp = 32;

namespace twin {

struct Thread {
  int index, lane, warp;
};
struct Block {
  int threads, index, count;
  char* shared;
};
extern Thread* thread;
extern Block block;

struct Site {
  const char* file;
  int line;
};

enum class Collective { kSync, kShuffleXor, kShuffle, kAny, kLoad, kLoadTransposed, kBFloat16, kTf32 };

// Waits for all lanes of the warp; the last one computes for all. `number` is a shuffle's distance or lane.
void meet(Collective kind, Site site, void* result, const void* a, const void* b);
uint64_t exchange(Collective kind, Site site, uint64_t value, int number);
void barrier(Site site);
void copy(Site site, void* shared, const void* global, int size, int bytes);
void commit();
void wait(Site site, int pending);

template <class T>
T exchange_bits(Collective kind, T value, int number, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "what shuffles can carry");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(kind, site, bits, number);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Numbers below the normal ones count as zero, in arguments and results of approximations.
inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

using Call = void (*)(const void* kernel, const void* argument);

template <class Argument>
void call(const void* kernel, const void* argument) {
  reinterpret_cast<void (*)(Argument)>(const_cast<void*>(kernel))(*static_cast<const Argument*>(argument));
}

void start(const void* kernel, Call call, const char* name, int blocks, int threads, size_t shared,
           const void* argument);

}  // namespace twin

inline int thread_index() { return twin::thread->index; }
inline int thread_count() { return twin::block.threads; }
inline int block_index() { return twin::block.index; }
inline int block_count() { return twin::block.count; }
inline int lane() { return twin::thread->lane; }
inline int warp() { return twin::thread->warp; }
inline int warp_count() { return twin::block.threads / kWarp; }

inline void sync_threads(XATTN_TWIN_SITE) { twin::barrier({file, line}); }
inline void sync_warp(XATTN_TWIN_SITE) { twin::meet(twin::Collective::kSync, {file, line}, nullptr, nullptr, nullptr); }

template <class T>
T shuffle_xor(T value, int mask, XATTN_TWIN_SITE) {
  return twin::exchange_bits(twin::Collective::kShuffleXor, value, mask, {file, line});
}
template <class T>
T shuffle(T value, int from, XATTN_TWIN_SITE) {
  return twin::exchange_bits(twin::Collective::kShuffle, value, from, {file, line});
}
inline bool any(bool value, XATTN_TWIN_SITE) {
  return twin::exchange(twin::Collective::kAny, {file, line}, value ? 1 : 0, 0) != 0;
}

inline char* shared_memory() { return twin::block.shared; }

inline uint32_t float_bits(float x) {
  uint32_t y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}
inline float bits_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

inline float bfloat16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
uint32_t pack_bfloat16(float low, float high);
inline uint32_t pack_bfloat16_relu(float low, float high) {
  return pack_bfloat16(low < 0.0f ? 0.0f : low, high < 0.0f ? 0.0f : high);
}
float float16_to_float(uint16_t x);
uint16_t float_to_float16(float x);
uint32_t float_to_tf32(float x);

inline int opaque(int x) { return x; }

inline float exp2_approximate(float x) { return twin::flush(std::exp2(twin::flush(x))); }
inline float log2_approximate(float x) { return std::log2(twin::flush(x)); }
// The product is exact in double; a second rounding of the sum is beyond what any test sees.
inline float fused_multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
inline float larger(float a, float b) { return std::fmax(a, b); }

inline void load_matrices(uint32_t (&r)[4], const void* row, XATTN_TWIN_SITE) {
  twin::meet(twin::Collective::kLoad, {file, line}, r, row, nullptr);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, XATTN_TWIN_SITE) {
  twin::meet(twin::Collective::kLoadTransposed, {file, line}, r, row, nullptr);
}

inline void multiply_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], XATTN_TWIN_SITE) {
  twin::meet(twin::Collective::kBFloat16, {file, line}, d, a, b);
}
inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], XATTN_TWIN_SITE) {
  twin::meet(twin::Collective::kTf32, {file, line}, d, a, b);
}

template <int kSize = 16>
void copy_async(void* shared, const void* global, int bytes = kSize, XATTN_TWIN_SITE) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16, "bytes of an asynchronous copy");
  twin::copy({file, line}, shared, global, kSize, bytes);
}
inline void commit_copies() { twin::commit(); }
template <int kPending>
void wait_copies(XATTN_TWIN_SITE) {
  twin::wait({file, line}, kPending);
}

// What cuda/launch.h has.
struct TwinStream;
using Stream = TwinStream*;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
};

struct Limits {
  int processors;
  int shared_bytes;
  int capability;
};
Limits limits();

int resident_blocks(const void* kernel, const char* name, int threads, size_t shared);

template <class Argument>
void launch(void (*kernel)(Argument), const char* name, int64_t works, int threads, size_t shared, Stream,
            Argument argument) {
  static_assert(sizeof(Argument) <= 4096, "parameters of a kernel");
  if (works <= 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  const int64_t most = resident_blocks(function, name, threads, shared);
  twin::start(function, &twin::call<Argument>, name, static_cast<int>(works < most ? works : most), threads, shared,
              &argument);
}

}  // namespace xattn::cuda
