// Running sums of u32 counts, in place, in three launches: sums of chunks, running sums of those by one block, running
// sums within chunks. The total comes after the last.
#include "portable.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;
constexpr u32 kChunk = 4096;  // counts of a block

// Sum of `value` over the block's threads before this one, and over all of them. smem_sums: kWarps + 1 numbers, not in
// use by anyone when this begins.
__device__ __forceinline__ u32 scan_block(u32 value, u32* smem_sums, u32& total) {
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  u32 sum = value;
#pragma unroll
  for (u32 distance = 1; distance < kWarp; distance *= 2) {
    const u32 other = __shfl_up_sync(kAllLanes, sum, distance);
    if (lane >= distance) sum += other;
  }
  if (lane == kWarp - 1) smem_sums[warp] = sum;
  __syncthreads();
  u32 before = 0;
  total = 0;
#pragma unroll
  for (u32 w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += smem_sums[w];
  }
  __syncthreads();
  return before + sum - value;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_chunk_sums(const u32* gmem_counts, u32 count, u32* gmem_sums) {
  SHARED(u32, smem_sums, kWarps);
  u32 sum = 0, total;
  for (u32 i = threadIdx.x; i < kChunk; i += kThreads) {
    const u64 at = static_cast<u64>(blockIdx.x) * kChunk + i;
    if (at < count) sum += gmem_counts[at];
  }
  scan_block(sum, smem_sums, total);
  if (threadIdx.x == 0) gmem_sums[blockIdx.x] = total;
}

// Replaces numbers first to end - 1 by `carry` plus the sum of those before, and returns the sum of all and the carry.
__device__ __forceinline__ u32 scan_range(u32* gmem, u64 first, u64 end, u32 carry, u32* smem_sums) {
  for (u64 begin = first; begin < end; begin += kThreads) {
    const u64 at = begin + threadIdx.x;
    u32 total;
    const u32 before = scan_block(at < end ? gmem[at] : 0, smem_sums, total);
    if (at < end) gmem[at] = carry + before;
    carry += total;
  }
  return carry;
}

extern "C" __global__ void __launch_bounds__(kThreads) tiles_scan_sums(u32* gmem_sums, u32 chunks) {
  SHARED(u32, smem_sums, kWarps);
  scan_range(gmem_sums, 0, chunks, 0, smem_sums);
}

extern "C" __global__ void __launch_bounds__(kThreads) tiles_scan(u32* gmem_counts, u32 count, const u32* gmem_sums) {
  SHARED(u32, smem_sums, kWarps);
  const u64 first = static_cast<u64>(blockIdx.x) * kChunk, end = min(first + kChunk, static_cast<u64>(count));
  const u32 total = scan_range(gmem_counts, first, end, gmem_sums[blockIdx.x], smem_sums);
  if (end == count && threadIdx.x == 0) gmem_counts[count] = total;
}
