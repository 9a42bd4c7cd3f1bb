// Everything that kernels ask of a GPU, in one place: what a thread is, barriers, votes, shared memory,
// fragments, products, copies. Kernels use nothing of CUDA but this.
//
// Under XATTN_TWIN the same names come from twin.h, which runs the threads of a block on the CPU
// (tests/cuda/twin): the sources of kernels compile unchanged with the host's compiler.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(XATTN_TWIN)
#include "twin.h"
#else

#include <cuda_runtime.h>

// Functions of kernels, and of hosts as well; kernels, with the threads of a block and the blocks that a
// multiprocessor shall hold at least; their one parameter.
#define XATTN_DEVICE __device__ __forceinline__
#define XATTN_BOTH __host__ __device__ __forceinline__
#define XATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define XATTN_PARAMETER const __grid_constant__
#define XATTN_UNROLL _Pragma("unroll")
#define XATTN_KEEP_LOOP _Pragma("unroll 1")

// Of what follows the host's own compiler, which sees this through the headers of hosts, knows nothing.
#if defined(__CUDACC__)
namespace xattn::cuda {

// Blocks and grids have one dimension.
XATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
XATTN_DEVICE int thread_count() { return static_cast<int>(blockDim.x); }
XATTN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
XATTN_DEVICE int block_count() { return static_cast<int>(gridDim.x); }

constexpr int kWarp = 32;
XATTN_DEVICE int lane() { return thread_index() % kWarp; }
XATTN_DEVICE int warp() { return thread_index() / kWarp; }
XATTN_DEVICE int warp_count() { return thread_count() / kWarp; }

// Barriers: all threads of a block; all lanes of a warp. Both order accesses to memory.
XATTN_DEVICE void sync_threads() { __syncthreads(); }
XATTN_DEVICE void sync_warp() { __syncwarp(); }

// Of all lanes of a warp, at once.
template <class T>
XATTN_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
template <class T>
XATTN_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xFFFFFFFFu, value, from);
}
XATTN_DEVICE bool any(bool value) { return __any_sync(0xFFFFFFFFu, value) != 0; }

// The block's shared memory: as many bytes as the launch gave it, at a multiple of 128.
XATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Types of 16 bits, as bits.
XATTN_DEVICE float bfloat16_to_float(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
// Both rounded to the nearest, `low` in the lower half.
XATTN_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Negative ones as zero; what is not a number stays so.
XATTN_DEVICE uint32_t pack_bfloat16_relu(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
XATTN_DEVICE float float16_to_float(uint16_t x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
XATTN_DEVICE uint16_t float_to_float16(float x) {
  uint16_t y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
// Rounded to the 10 bits of mantissa that products of tf32 see.
XATTN_DEVICE uint32_t float_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
XATTN_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
XATTN_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// The same number, of which the compiler knows nothing: what follows from it is computed where it is used, not
// ahead of a loop, for which there may be no registers.
XATTN_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// One instruction of the special-function units each: relative errors of about 2^-22.
XATTN_DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
XATTN_DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
XATTN_DEVICE float fused_multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// The larger of two numbers, or the one of them that is a number.
XATTN_DEVICE float larger(float a, float b) { return fmaxf(a, b); }

// Four matrices of 8 x 8 elements of 16 bits from shared memory. Lane 8 i + r has the address of row r
// of matrix i, a multiple of 16 bytes. Lane l receives of matrix i elements (l / 4, 2 (l % 4)) and
// (l / 4, 2 (l % 4) + 1) in r[i]; transposed, elements (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4).
XATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
XATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d += a b by a warp. With g = lane / 4 and t = lane % 4, d holds elements (g, 2 t), (g, 2 t + 1),
// (g + 8, 2 t), (g + 8, 2 t + 1) of a 16 x 8 matrix in all of them.
// bfloat16: a is 16 x 16, pairs (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); b is 16 x 8,
// pairs of rows 2 t and 2 t + 8 in column g.
XATTN_DEVICE void multiply_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// tf32: a is 16 x 8, elements (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b is 8 x 8, rows t and
// t + 4 of column g.
XATTN_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies of kSize = 4, 8 or 16 bytes from global to shared memory that go on by themselves; both addresses
// are multiples of kSize. `bytes` of them are read, the rest is zero. A thread's copies since its last
// commit_copies are a group; wait_copies<n> returns when all but its n latest groups have landed, to be
// seen by this thread, and by others after a barrier.
template <int kSize = 16>
XATTN_DEVICE void copy_async(void* shared, const void* global, int bytes = kSize) {
  static_assert(kSize == 4 || kSize == 8 || kSize == 16, "bytes of an asynchronous copy");
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kSize == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(kSize), "r"(bytes)
                 : "memory");
  }
}
XATTN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
XATTN_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace xattn::cuda
#endif
#endif
