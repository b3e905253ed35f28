// Products of BF16 or FP16 fragments with FP32 sums (PTX ISA: mma.m16n8k16, mma.m16n8k8; sm_80 and later), and rounding
// to these.
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

// c += a * b, for A [16, 16], B [16, 8], C [16, 8]. Lane 4q + t holds
//   a.x, y, z, w  rows q, q + 8, q, q + 8; columns 2t and 2t + 1, in z and w 8 more
//   b0, b1        rows 2t and 2t + 1, in b1 8 more; column q
//   c             rows q, q, q + 8, q + 8; columns 2t, 2t + 1, 2t, 2t + 1
// Called by all lanes of a warp. A column of C depends on that column of B alone.
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint4 a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], uint4 a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// c += a * b for half of the columns, A [16, 8] and B [8, 8]: fragments as above, without z, w and b1.
__device__ __forceinline__ void mma_bf16_half(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

__device__ __forceinline__ void mma_f16_half(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// To the nearest, ties to even; NaNs become 0x7FFF.
__device__ __forceinline__ u16 to_bf16(float value) {
  u16 word;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(value));
  return word;
}

__device__ __forceinline__ u16 to_f16(float value) {
  u16 word;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
  return word;
}

__device__ __forceinline__ float from_f16(u16 word) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
  return value;
}

#endif

__device__ __forceinline__ float from_bf16(u16 word) { return __uint_as_float(static_cast<u32>(word) << 16); }
