// What only compute capability 9.0 has, in its own instruction set (sm_90a): products of four warps at a
// time with operands in shared memory, barriers in shared memory, and copies of whole runs of bytes that
// complete on them. Kernels use nothing of it but this.
//
// Under XATTN_TWIN the same names come from sm90_twin.h (tests/cuda/twin). Other architectures have none of
// them: bodies that use them are left out there (XATTN_HAS_SM90A).
//
// A matrix in shared memory consists of cores: 8 x 8 elements of 16 bits, 128 bytes at a multiple of 16.
// Where k (what is summed over) is minor, a core is 8 rows of 8 k; else 8 k of 8 rows. `k_step` is the
// distance in bytes between cores that are neighbours along k, `row_step` that of neighbours along the rows
// of a left, the columns of a right operand.
#pragma once

#include "device.h"

#if defined(XATTN_TWIN)
#include "sm90_twin.h"
#else

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define XATTN_HAS_SM90A 1
#endif

namespace xattn::cuda {

constexpr int kWarpgroup = 4 * kWarp;

#if defined(XATTN_HAS_SM90A)

XATTN_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Of `threads` threads, all those of some warps; numbers 1 to 15.
XATTN_DEVICE void sync_some(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What this thread wrote to shared memory before is seen by products and bulk copies after it, and after
// a barrier by those of others.
XATTN_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier in shared memory: a phase ends when `arrivals` threads have arrived and all bytes expected by
// then have landed. wait_phase(b, 0) waits for the end of the first phase, wait_phase(b, 1) of the second.
struct alignas(8) Mbarrier {
  uint64_t state;
};
// To be called by one thread; seen by others, and by copies, after a barrier of the block.
XATTN_DEVICE void start_mbarrier(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
XATTN_DEVICE void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
XATTN_DEVICE void arrive_expecting(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
XATTN_DEVICE void wait_phase(Mbarrier* barrier, int parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// A run of bytes from global to shared memory, by one thread; all three are multiples of 16.
XATTN_DEVICE void copy_bulk(void* shared, const void* global, int bytes, Mbarrier* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Four matrices of 8 x 8 elements of 16 bits to shared memory: the reverse of load_matrices.
XATTN_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
XATTN_DEVICE void store_matrices_transposed(void* row, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Registers that each of this warpgroup's threads may have from now on.
template <int kRegisters>
XATTN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
XATTN_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// A matrix in shared memory as products take it. Adding bytes / 16 moves its beginning.
XATTN_DEVICE uint64_t describe(const void* data, int k_step, int row_step) {
  return static_cast<uint64_t>((shared_address(data) & 0x3FFFF) >> 4) | static_cast<uint64_t>(k_step >> 4) << 16 |
         static_cast<uint64_t>(row_step >> 4) << 32;
}

// Products go on by themselves. begin_products comes before the first one and whenever their registers
// have been written; commit_products makes a group of those since the last; wait_products<n> returns
// when all but the n latest groups are done, until when their registers must not be touched.
XATTN_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
XATTN_DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
XATTN_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses to registers of products across this place.
template <int kCount>
XATTN_DEVICE void hold(float (&d)[kCount]) {
  XATTN_UNROLL
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
XATTN_DEVICE void hold(uint32_t& a) { asm volatile("" : "+r"(a)::"memory"); }

// d += a b by a warpgroup for bfloat16 matrices of 64 x 16 and 16 x kColumns; d = a b without `add`. Warp w
// of the four has rows 16 w to 16 w + 15, with g = lane / 4 and t = lane % 4 in d[4 n + i] elements (g, 8 n +
// 2 t), (g, 8 n + 2 t + 1), (g + 8, 8 n + 2 t), (g + 8, 8 n + 2 t + 1) of these. In registers, `a` is as that of
// multiply_bfloat16. kLeftByRows, kRightByColumns: rows or columns are minor, not k.
template <int kColumns>
struct WideProduct;

#define XATTN_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define XATTN_20(i) XATTN_4(i), XATTN_4(i + 4), XATTN_4(i + 8), XATTN_4(i + 12), XATTN_4(i + 16)
#define XATTN_24(i) XATTN_20(i), XATTN_4(i + 20)
#define XATTN_36(i) XATTN_24(i), XATTN_4(i + 24), XATTN_4(i + 28), XATTN_4(i + 32)
#define XATTN_48(i) XATTN_24(i), XATTN_24(i + 24)
#define XATTN_72(i) XATTN_36(i), XATTN_36(i + 36)

#define XATTN_NAMES_20 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19"
#define XATTN_NAMES_24 XATTN_NAMES_20 ", %20, %21, %22, %23"
#define XATTN_NAMES_36 XATTN_NAMES_24 ", %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35"
#define XATTN_NAMES_48 XATTN_NAMES_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define XATTN_NAMES_72                                                                               \
  XATTN_NAMES_48                                                                                     \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66," \
  " %67, %68, %69, %70, %71"

// i0 to i4: the names of the operands after `count` accumulators.
#define XATTN_WIDE_PRODUCT(columns, count, i0, i1, i2, i3, i4, i5, i6)                                    \
  template <>                                                                                             \
  struct WideProduct<columns> {                                                                           \
    template <int kLeftByRows, int kRightByColumns>                                                       \
    static XATTN_DEVICE void shared(float (&d)[count], uint64_t a, uint64_t b, bool add) {                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i2                                                 \
                   ", 0;\n"                                                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" XATTN_NAMES_##count \
                   "}, " i0 ", " i1 ", p, 1, 1, " i3 ", " i4 ";\n}\n"                                     \
                   : XATTN_##count(0)                                                                     \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(kLeftByRows), "n"(kRightByColumns)); \
    }                                                                                                     \
    template <int kRightByColumns>                                                                        \
    static XATTN_DEVICE void registers(float (&d)[count], const uint32_t (&a)[4], uint64_t b, bool add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " i5                                                 \
                   ", 0;\n"                                                                               \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 {" XATTN_NAMES_##count \
                   "}, {" i0 ", " i1 ", " i2 ", " i3 "}, " i4 ", p, 1, 1, " i6 ";\n}\n"                   \
                   : XATTN_##count(0)                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)),      \
                     "n"(kRightByColumns));                                                               \
    }                                                                                                     \
  }
XATTN_WIDE_PRODUCT(40, 20, "%20", "%21", "%22", "%23", "%24", "%25", "%26");
XATTN_WIDE_PRODUCT(48, 24, "%24", "%25", "%26", "%27", "%28", "%29", "%30");
XATTN_WIDE_PRODUCT(72, 36, "%36", "%37", "%38", "%39", "%40", "%41", "%42");
XATTN_WIDE_PRODUCT(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54");
XATTN_WIDE_PRODUCT(144, 72, "%72", "%73", "%74", "%75", "%76", "%77", "%78");

template <bool kLeftByRows, bool kRightByColumns, int kCount>
XATTN_DEVICE void multiply_wide(float (&d)[kCount], uint64_t a, uint64_t b, bool add) {
  WideProduct<2 * kCount>::template shared<kLeftByRows, kRightByColumns>(d, a, b, add);
}
template <bool kRightByColumns, int kCount>
XATTN_DEVICE void multiply_wide(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool add) {
  WideProduct<2 * kCount>::template registers<kRightByColumns>(d, a, b, add);
}

#endif

}  // namespace xattn::cuda
#endif
