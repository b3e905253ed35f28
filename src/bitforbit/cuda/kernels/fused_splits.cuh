// How the sums of a unit's splits meet in device memory: of kThreads threads, each with kSums times four of them.
#pragma once
#include "fused.cuh"

// Puts this block's sums to device memory. The block of the unit that comes last takes those of all splits back and
// adds them as the rules have it; for the others the answer is false.
template <u32 kThreads, u32 kSums>
__device__ __forceinline__ bool add_splits(float (&sum)[kSums][4], float4* gmem_sums, u32* gmem_arrived, u32 unit,
                                           u32 split, u32 splits, Rules rules, u8* smem) {
  constexpr u32 kBlockSums = kSums * kThreads;
  float4* gmem_unit = gmem_sums + static_cast<u64>(unit) * splits * kBlockSums + threadIdx.x;
#pragma unroll
  for (u32 n = 0; n < kSums; ++n) {
    const bool round = rules.rounds_partials();
    __stcg(gmem_unit + static_cast<u64>(split) * kBlockSums + n * kThreads,
           make_float4(rounded(sum[n][0], round), rounded(sum[n][1], round), rounded(sum[n][2], round),
                       rounded(sum[n][3], round)));
  }
  __threadfence();
  __syncthreads();
  u32* smem_last = reinterpret_cast<u32*>(smem);
  if (threadIdx.x == 0) *smem_last = atomicAdd(gmem_arrived, 1) == splits - 1 ? 1 : 0;
  __syncthreads();
  if (*smem_last == 0) return false;
  if (threadIdx.x == 0) *gmem_arrived = 0;  // for the next launch
  __threadfence();
  const u32 left = add_trees(gmem_unit, kBlockSums, kThreads, splits, rules);
  for (u32 i = 0; i < left; ++i) {
    const float4* gmem_split = gmem_unit + static_cast<u64>(rules.descending() ? left - 1 - i : i) * kBlockSums;
#pragma unroll
    for (u32 n = 0; n < kSums; ++n) {
      const float4 part = __ldcg(gmem_split + n * kThreads);
      const bool round = rules.rounds_sums();
      sum[n][0] = i == 0 ? part.x : rounded(sum[n][0] + part.x, round);
      sum[n][1] = i == 0 ? part.y : rounded(sum[n][1] + part.y, round);
      sum[n][2] = i == 0 ? part.z : rounded(sum[n][2] + part.z, round);
      sum[n][3] = i == 0 ? part.w : rounded(sum[n][3] + part.w, round);
    }
  }
  return true;
}
