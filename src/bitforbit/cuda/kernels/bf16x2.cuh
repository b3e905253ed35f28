// Pairs of BF16 in a register, 8 x 8 transposes, and other small things of the PTX ISA (sm_80 and later).
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

// Each half times, or plus, the other's; rounded once. Sums by a product with 1: sm_80 has no other.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
  u32 product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// What multiply_pairs(a, b) has lost: each half of a * b - product, rounded once.
__device__ __forceinline__ u32 lost_pairs(u32 a, u32 b, u32 product) {
  u32 lost;
  asm("{.reg .b32 minus;\n neg.bf16x2 minus, %3;\n fma.rn.bf16x2 %0, %1, %2, minus;}"
      : "=r"(lost)
      : "r"(a), "r"(b), "r"(product));
  return lost;
}

__device__ __forceinline__ u32 add_pairs(u32 a, u32 b) {
  u32 sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return sum;
}

// (word & mask) | bits, in one instruction: of two constants the compiler would make two.
__device__ __forceinline__ u32 mask_or(u32 word, u32 mask, u32 bits) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// To the nearest, ties to even: [15:0] low, [31:16] high.
__device__ __forceinline__ u32 to_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Lane 4q + t has row q, columns 2t and 2t + 1 of an 8 x 8 matrix of 16-bit elements, and gets those of its transpose.
// Called by all lanes of a warp.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

// 2^x within about 2 units in the last place; small ones are 0.
__device__ __forceinline__ float power_of_2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// 1 / x within a unit in the last place; of infinity 0.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// The line around an address, from device memory to L2.
__device__ __forceinline__ void prefetch(const void* gmem) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(gmem)));
}

#endif

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }
