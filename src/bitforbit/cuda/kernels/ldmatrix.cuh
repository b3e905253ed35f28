// Loads of 8 x 8 matrices of 16-bit elements from shared memory (PTX ISA: ldmatrix; sm_75 and later).
#pragma once
#include "portable.cuh"

#ifndef BITFORBIT_CUDA_SHIM

// Lane 8k + a gives the address of row a (16 bytes, aligned) of matrix k, k = 0-3. Lane 4q + t gets 32-bit word t of
// row q of matrices 0, 1, 2, 3 in x, y, z, w. Called by all lanes of a warp.
__device__ __forceinline__ uint4 ldmatrix_x4(const void* smem_row) {
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(static_cast<u32>(__cvta_generic_to_shared(smem_row)))
               : "memory");
  return words;
}

#endif
