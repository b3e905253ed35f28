// Products of small matrices by the tensor cores: D = A B + D, BF16 times BF16, sums in FP32 (PTX ISA: mma.m16n8k16;
// sm_80 and later). Called by all lanes of a warp.
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

// With g = lane / 4, t = lane % 4, the lower index in the low half of a register:
//   a [16 x 16], row g + 8 * (r % 2), columns 2t + 8 * (r / 2) and the next, r = 0-3
//   b [16 x 8], rows 2t + 8r and the next, column g, r = 0-1
//   d [16 x 8], row g + 8 * (r / 2), column 2t + r % 2, r = 0-3
// Products are exact; the order in which the 16 of them and d are added, and how sums are rounded, is not documented.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
