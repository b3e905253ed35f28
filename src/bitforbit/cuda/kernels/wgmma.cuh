// Products by a warpgroup, four warps of which the first has a number divisible by 4, while its threads do other things
// (PTX ISA: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"; sm_90a and no other architecture).
//
// sum [64, N] += a [64, 16] * b [16, N]: a in registers, b in shared memory, N = 8, 16, 32, 64. Order of calls, by all
// threads of the warpgroup: b is there, fence_async() by who wrote it and a barrier; a is loaded; wgmma_fence();
// products, one after the other into the same sums if need be; wgmma_commit(). Until wgmma_wait() has seen their end,
// no register of a and sum may be touched and b must stay.
#pragma once
#include "async.cuh"

// b as the columns of a matrix [N, 64] of BF16 or FP16 in shared memory, on 1024 bytes (PTX ISA: "Shared Memory Matrix
// Layout", K-major, 128-byte swizzle): rows of 128 bytes, in which the pieces of 16 bytes change places by the row.
constexpr u32 kSwizzleBytes = 1024;  // eight rows: the pattern's period

// Byte at which piece `piece` (0-7) of row `row` lies: bits [6:4] are XORed with bits [9:7].
__device__ __forceinline__ constexpr u32 swizzled(u32 row, u32 piece) { return 128 * row + 16 * (piece ^ row % 8); }

// Where b is, for its first 16 columns (PTX ISA: "Matrix Descriptor Format"): [13:0] address / 16, [29:16] leading
// dimension's offset, without meaning in this layout, [45:32] bytes from eight rows to the next / 16, [51:49] base
// offset, 0 on 1024 bytes, [63:62] swizzle, 1 for 128 bytes.
__device__ __forceinline__ constexpr u64 wgmma_descriptor(u32 smem_address) {
  return u64{1} << 62 | u64{kSwizzleBytes / 16} << 32 | u64{1} << 16 | (smem_address & 0x3FFFF) >> 4;
}
constexpr u32 kDescriptorStep = 2;  // 16 columns further: 32 bytes, which the hardware swizzles like the address

static_assert(swizzled(0, 5) == 80 && swizzled(3, 5) == 384 + 96 && swizzled(9, 0) == 1152 + 16);
static_assert(wgmma_descriptor(0x400) == 0x4000004000010040u);

#ifndef BITFORBIT_CUDA_SHIM
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// A value, or a pointer to shared memory, that the compiler has to keep in a register: else it prefers to compute it
// anew wherever it is used.
__device__ __forceinline__ u32 kept(u32 value) {
  asm volatile("" : "+r"(value));
  return value;
}

template <class T>
__device__ __forceinline__ T* kept(T* smem) {
  return static_cast<T*>(__cvta_shared_to_generic(kept(shared_address(smem))));
}

// sum += a * b for N = 8 times its first dimension. Lane 4q + t of warp w has of a the fragment of mma_bf16 (mma.cuh)
// for rows 16w to 16w + 15, and of sum[n] what mma_bf16 has of c, for columns 8n to 8n + 7.
#define BITFORBIT_WGMMA(NAME, TYPE)                                                                             \
  __device__ __forceinline__ void NAME(float (&sum)[1][4], const uint4& a, u64 b) {                             \
    asm volatile(                                                                                               \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n8k16.f32." TYPE "." TYPE                                              \
        " {"                                                                                                    \
        "%0, %1, %2, %3"                                                                                        \
        "}, {%4, %5, %6, %7}, %8, add, 1, 1, 0;\n}"                                                             \
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3])                                    \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)                                                        \
        : "memory");                                                                                            \
  }                                                                                                             \
                                                                                                                \
  __device__ __forceinline__ void NAME(float (&sum)[2][4], const uint4& a, u64 b) {                             \
    asm volatile(                                                                                               \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPE "." TYPE                                             \
        " {"                                                                                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7"                                                                        \
        "}, {%8, %9, %10, %11}, %12, add, 1, 1, 0;\n}"                                                          \
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), \
          "+f"(sum[1][2]), "+f"(sum[1][3])                                                                      \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)                                                        \
        : "memory");                                                                                            \
  }                                                                                                             \
                                                                                                                \
  __device__ __forceinline__ void NAME(float (&sum)[4][4], const uint4& a, u64 b) {                             \
    asm volatile(                                                                                               \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                                             \
        " {"                                                                                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                  \
        "}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n}"                                                        \
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), \
          "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]), \
          "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3])                                    \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)                                                        \
        : "memory");                                                                                            \
  }                                                                                                             \
                                                                                                                \
  __device__ __forceinline__ void NAME(float (&sum)[8][4], const uint4& a, u64 b) {                             \
    asm volatile(                                                                                               \
        "{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                                             \
        " {"                                                                                                    \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                        \
        "}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                                                        \
        : "+f"(sum[0][0]), "+f"(sum[0][1]), "+f"(sum[0][2]), "+f"(sum[0][3]), "+f"(sum[1][0]), "+f"(sum[1][1]), \
          "+f"(sum[1][2]), "+f"(sum[1][3]), "+f"(sum[2][0]), "+f"(sum[2][1]), "+f"(sum[2][2]), "+f"(sum[2][3]), \
          "+f"(sum[3][0]), "+f"(sum[3][1]), "+f"(sum[3][2]), "+f"(sum[3][3]), "+f"(sum[4][0]), "+f"(sum[4][1]), \
          "+f"(sum[4][2]), "+f"(sum[4][3]), "+f"(sum[5][0]), "+f"(sum[5][1]), "+f"(sum[5][2]), "+f"(sum[5][3]), \
          "+f"(sum[6][0]), "+f"(sum[6][1]), "+f"(sum[6][2]), "+f"(sum[6][3]), "+f"(sum[7][0]), "+f"(sum[7][1]), \
          "+f"(sum[7][2]), "+f"(sum[7][3])                                                                      \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b)                                                        \
        : "memory");                                                                                            \
  }

BITFORBIT_WGMMA(wgmma_bf16, "bf16")
BITFORBIT_WGMMA(wgmma_f16, "f16")
#undef BITFORBIT_WGMMA

// Between ordinary accesses to the registers of products and the products.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The products since the last commit are a group; groups end in their order.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the last kGroups groups are on their way.
template <u32 kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// After the wait for the last group: keeps the compiler from reading the sums before it.
template <u32 kTiles>
__device__ __forceinline__ void wgmma_settle(float (&sum)[kTiles][4]) {
#pragma unroll
  for (u32 n = 0; n < kTiles; ++n) {
#pragma unroll
    for (u32 e = 0; e < 4; ++e) asm volatile("" : "+f"(sum[n][e])::"memory");
  }
}

#endif
#endif
