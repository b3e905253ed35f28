#include "portable.cuh"

// Every kind of parameter, written to memory as 64-bit words.
extern "C" __global__ void __launch_bounds__(32)
    probe_parameters(u64* gmem_out, u32 unsigned_word, i32 signed_word, u64 wide_word, float number) {
  if (threadIdx.x == 0) {
    gmem_out[0] = unsigned_word;
    gmem_out[1] = (u64)(i64)signed_word;
    gmem_out[2] = wide_word;
    gmem_out[3] = (u64)(number * 1024.0f);
  }
}

// gmem_words[i] = gmem_words[i] * factor + addend
extern "C" __global__ void __launch_bounds__(256) probe_scale(u32* gmem_words, u32 factor, u32 addend, u32 count) {
  u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) gmem_words[i] = gmem_words[i] * factor + addend;
}

// Reverses `count` words by way of the dynamic shared memory. One block.
extern "C" __global__ void __launch_bounds__(256) probe_reverse(u32* gmem_words, u32 count) {
  DYNAMIC_SHARED(u32, smem_words);
  for (u32 i = threadIdx.x; i < count; i += blockDim.x) smem_words[i] = gmem_words[i];
  __syncthreads();
  for (u32 i = threadIdx.x; i < count; i += blockDim.x) gmem_words[i] = smem_words[count - 1 - i];
}
