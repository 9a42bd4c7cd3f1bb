// The names of cuda/sm90.h for the host's compiler: products of warpgroups from the same descriptors, barriers in
// shared memory, bulk copies.
//
// A product is carried out by each warp of its own, when its last lane has come, or only when one of them waits, by
// seed; until then the accumulators are not numbers, and registers that change meanwhile are an error. It must find
// what it reads of shared memory as fence_async or a bulk copy left it. Bulk copies land at once, or when somebody
// waits for them.
#pragma once

#include "twin.h"

#define XATTN_HAS_SM90A 1

namespace xattn::cuda {

constexpr int kWarpgroup = 4 * kWarp;

struct alignas(8) Mbarrier {
  uint64_t state;
};

namespace twin {

// What a product is given; `a` is null where the left operand lies in shared memory.
struct WideOperands {
  int columns;
  float* d;
  const uint32_t* a;
  uint64_t left, right;
  bool left_by_rows, right_by_columns, add;
};

uint32_t shared_offset(Site site, const void* pointer);
void sync_some(Site site, int number, int threads);
void fence_async(Site site);
void start_mbarrier(Site site, Mbarrier* barrier, int arrivals);
void arrive(Site site, Mbarrier* barrier, int bytes);
void wait_phase(Site site, Mbarrier* barrier, int parity);
void copy_bulk(Site site, void* shared, const void* global, int bytes, Mbarrier* barrier);
void begin_products();
void multiply_wide(Site site, const WideOperands& operands);
void commit_products();
void wait_products(Site site, int pending);

}  // namespace twin

inline void sync_some(int number, int threads, XATTN_TWIN_SITE) { twin::sync_some({file, line}, number, threads); }
inline void fence_async(XATTN_TWIN_SITE) { twin::fence_async({file, line}); }

inline void start_mbarrier(Mbarrier* barrier, int arrivals, XATTN_TWIN_SITE) {
  twin::start_mbarrier({file, line}, barrier, arrivals);
}
inline void arrive(Mbarrier* barrier, XATTN_TWIN_SITE) { twin::arrive({file, line}, barrier, 0); }
inline void arrive_expecting(Mbarrier* barrier, int bytes, XATTN_TWIN_SITE) {
  twin::arrive({file, line}, barrier, bytes);
}
inline void wait_phase(Mbarrier* barrier, int parity, XATTN_TWIN_SITE) {
  twin::wait_phase({file, line}, barrier, parity);
}
inline void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier, XATTN_TWIN_SITE) {
  twin::copy_bulk({file, line}, shared, global, bytes, barrier);
}

// Every lane writes its own elements to the rows whose addresses others have.
inline void store_matrices(void* row, const uint32_t (&r)[4], XATTN_TWIN_SITE) {
  for (int i = 0; i < 4; ++i) {
    const uint64_t to = shuffle(reinterpret_cast<uint64_t>(row), 8 * i + lane() / 4, file, line);
    twin::shared_offset({file, line}, row);
    std::memcpy(reinterpret_cast<char*>(to) + lane() % 4 * 4, &r[i], 4);
  }
}
inline void store_matrices_transposed(void* row, const uint32_t (&r)[4], XATTN_TWIN_SITE) {
  for (int i = 0; i < 4; ++i) {
    for (int half = 0; half < 2; ++half) {
      const uint64_t to = shuffle(reinterpret_cast<uint64_t>(row), 8 * i + lane() % 4 * 2 + half, file, line);
      const uint16_t x = static_cast<uint16_t>(r[i] >> 16 * half);
      twin::shared_offset({file, line}, row);
      std::memcpy(reinterpret_cast<char*>(to) + lane() / 4 * 2, &x, 2);
    }
  }
}

template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "registers of a thread");
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "registers of a thread");
}

inline uint64_t describe(const void* data, int k_step, int row_step, XATTN_TWIN_SITE) {
  return static_cast<uint64_t>((twin::shared_offset({file, line}, data) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(k_step >> 4) << 16 | static_cast<uint64_t>(row_step >> 4) << 32;
}

inline void begin_products() { twin::begin_products(); }
inline void commit_products() { twin::commit_products(); }
template <int kPending>
void wait_products(XATTN_TWIN_SITE) {
  twin::wait_products({file, line}, kPending);
}
template <int kCount>
void hold(float (&)[kCount]) {}
inline void hold(uint32_t&) {}

template <bool kLeftByRows, bool kRightByColumns, int kCount>
void multiply_wide(float (&d)[kCount], uint64_t a, uint64_t b, bool add, XATTN_TWIN_SITE) {
  twin::multiply_wide({file, line}, {2 * kCount, d, nullptr, a, b, kLeftByRows, kRightByColumns, add});
}
template <bool kRightByColumns, int kCount>
void multiply_wide(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add, XATTN_TWIN_SITE) {
  twin::multiply_wide({file, line}, {2 * kCount, d, a, 0, b, false, kRightByColumns, add});
}

}  // namespace xattn::cuda
