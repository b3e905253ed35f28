// One planted fault per kernel; tests/cuda/test_emulation_faults.py says which check must report it.
#include "portable.cuh"

// Reads bytes, the last thread one too many.
extern "C" __global__ void global_read(const u8* in, u32* out, u32 n) { out[threadIdx.x] = in[n - 31 + threadIdx.x]; }

extern "C" __global__ void global_write(u8* out, u32 n) { out[n - 31 + threadIdx.x] = 1; }

extern "C" __global__ void global_before(const u8* in, u32* out) { out[threadIdx.x] = in[i32(threadIdx.x) - 1]; }

extern "C" __global__ void shared_read(u32* out) {
  SHARED(u8, smem_bytes, 33);
  smem_bytes[threadIdx.x] = 0;
  if (threadIdx.x == 0) smem_bytes[32] = 0;
  __syncthreads();
  out[threadIdx.x] = smem_bytes[threadIdx.x + 2];
}

extern "C" __global__ void dynamic_write(u32* out) {
  DYNAMIC_SHARED(u32, smem_words);
  smem_words[threadIdx.x + 1] = out[threadIdx.x];
}

// A barrier is missing between the warps.
extern "C" __global__ void no_barrier(u32* out) {
  SHARED(u32, smem_words, 64);
  smem_words[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = smem_words[63 - threadIdx.x];
}

// A barrier is missing before the array is used again.
extern "C" __global__ void no_second_barrier(u32* out) {
  SHARED(u32, smem_words, 64);
  for (u32 i = 0; i < 2; ++i) {
    smem_words[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    out[64 * i + threadIdx.x] = smem_words[63 - threadIdx.x];
  }
}

// The last thread writes what the others may not have read yet.
extern "C" __global__ void write_after_read(u32* out) {
  SHARED(u32, smem_word, 1);
  if (threadIdx.x == 0) smem_word[0] = 1;
  __syncthreads();
  out[threadIdx.x] = smem_word[0];
  if (threadIdx.x == 63) smem_word[0] = 2;
}

// Lanes read what others wrote, without __syncwarp.
extern "C" __global__ void no_syncwarp(u32* out) {
  SHARED(u32, smem_words, 32);
  smem_words[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = smem_words[31 - threadIdx.x];
}

// The upper half is in step with itself, not with the lower half.
extern "C" __global__ void half_syncwarp(u32* out) {
  SHARED(u32, smem_words, 32);
  smem_words[threadIdx.x] = threadIdx.x;
  __syncwarp(threadIdx.x < 16 ? 0x0000FFFFu : 0xFFFF0000u);
  out[threadIdx.x] = smem_words[31 - threadIdx.x];
}

// A vote brings lanes together, but does not order their memory accesses.
extern "C" __global__ void vote_is_no_fence(u32* out) {
  SHARED(u32, smem_words, 32);
  smem_words[threadIdx.x] = threadIdx.x;
  const int all = __all_sync(kAllLanes, 1);
  out[threadIdx.x] = smem_words[31 - threadIdx.x] + all;
}

extern "C" __global__ void divergent_barrier(u32* out) {
  if (threadIdx.x < 40) {
    out[threadIdx.x] = 1;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

// Half of a warp waits for the block, half for its warp.
extern "C" __global__ void barrier_in_warp(u32* out) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_sync(kAllLanes, threadIdx.x, 0);
}

extern "C" __global__ void mask_without_self(u32* out) { out[threadIdx.x] = __ballot_sync(0x7FFFFFFFu, 1); }

extern "C" __global__ void mask_of_absent(u32* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  __syncthreads();
}

extern "C" __global__ void shuffle_from_exited(u32* out) {
  if (threadIdx.x == 9) return;
  out[threadIdx.x] = __shfl_sync(kAllLanes, threadIdx.x, 9);
}

extern "C" __global__ void different_collectives(u32* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(kAllLanes, threadIdx.x, 0);
  } else {
    out[threadIdx.x] = __ballot_sync(kAllLanes, 1);
  }
}

extern "C" __global__ void misaligned_load(const u8* in, u32* out) {
  const uint4 vector = *reinterpret_cast<const uint4*>(in + 8);
  out[threadIdx.x] = vector.x;
}

extern "C" __global__ void misaligned_store(u8* out) { *reinterpret_cast<u32*>(out + 4 * threadIdx.x + 2) = 1; }

extern "C" __global__ void misaligned_shared(u32* out) {
  SHARED(u8, smem_bytes, 1024);
  for (u32 i = threadIdx.x; i < 1024; i += 32) smem_bytes[i] = u8(i);
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const uint2*>(smem_bytes + 4)[threadIdx.x].x;
}

extern "C" __global__ void uninitialized_shared(u32* out) {
  SHARED(u32, smem_words, 33);
  smem_words[threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = smem_words[threadIdx.x + 1];
}

extern "C" __global__ void shift_by_width(const u32* in, u32* out) { out[threadIdx.x] = 1u << in[threadIdx.x]; }

extern "C" __global__ void __launch_bounds__(64) bounded(u32* out) { out[threadIdx.x] = 1; }

extern "C" __global__ void deep_stack(u32* out, u32 n) {
  volatile u8 large[70000];
  for (u32 i = 0; i < 70000; ++i) large[i] = u8(n);
  out[threadIdx.x] = large[n];
}
