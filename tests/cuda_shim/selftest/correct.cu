// Kernels without a fault: every check of the emulation must let them pass.
#include "portable.cuh"

constexpr u32 kThreads = 96;

// Sums [n] words: a sum in every warp, one of the warps' sums, one atomic per block.
extern "C" __global__ void __launch_bounds__(kThreads) sum_words(const u32* words, u64 n, u64* total) {
  SHARED(u32, smem_sums, 3);
  const u64 stride = u64(gridDim.x) * kThreads;
  u32 sum = 0;
  for (u64 i = u64(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) sum += load_once(words + i);
  for (u32 step = kWarp / 2; step != 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (threadIdx.x % kWarp == 0) smem_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(total, u64(smem_sums[0]) + smem_sums[1] + smem_sums[2]);
}

// Reverses a row of `blockDim.x` 16-byte vectors through dynamic shared memory; blocks along y.
extern "C" __global__ void reverse(const uint4* in, uint4* out) {
  DYNAMIC_SHARED(uint4, smem_row);
  const u32 width = blockDim.x * blockDim.y, at = threadIdx.y * blockDim.x + threadIdx.x;
  smem_row[at] = in[u64(blockIdx.y) * width + at];
  __syncthreads();
  out[u64(blockIdx.y) * width + at] = smem_row[width - 1 - at];
}

// Lanes past n leave before the collective, which the others enter without them.
extern "C" __global__ void __launch_bounds__(32) early_exit(u32* ballots, u32 n) {
  if (threadIdx.x >= n) return;
  ballots[threadIdx.x] = __ballot_sync(kAllLanes, threadIdx.x % 2);
}

// Halves of a warp with masks of their own, in different branches; neighbours exchange through shared memory.
extern "C" __global__ void __launch_bounds__(32) halves(u32* out) {
  SHARED(u32, smem_words, 32);
  const u32 lane = threadIdx.x;
  u32 value;
  if (lane < 16) {
    smem_words[lane] = 3 * lane;
    __syncwarp(0x0000FFFFu);
    value = smem_words[lane ^ 1];
  } else {
    smem_words[lane] = 5 * lane;
    __syncwarp(0xFFFF0000u);
    value = smem_words[lane ^ 3];
  }
  __syncwarp();
  smem_words[lane] = value;
  __syncwarp();
  out[lane] = smem_words[31 - lane] + __reduce_max_sync(kAllLanes, value);
}

// What each warp collective and each atomic gives, one lane's results side by side.
extern "C" __global__ void __launch_bounds__(32) collectives(const u32* in, u32* out, u32* cells, u64* wide) {
  const u32 lane = threadIdx.x, value = in[lane];
  u32* mine = out + 16 * lane;
  mine[0] = __shfl_sync(kAllLanes, value, lane + 5, 8);
  mine[1] = __shfl_up_sync(kAllLanes, value, 3);
  mine[2] = __shfl_down_sync(kAllLanes, value, 3, 16);
  mine[3] = __match_any_sync(kAllLanes, value % 4);
  mine[4] = __reduce_add_sync(kAllLanes, value);
  mine[5] = __reduce_min_sync(kAllLanes, value);
  mine[6] = __reduce_or_sync(kAllLanes, value);
  mine[7] = __all_sync(kAllLanes, value != 0) + 2 * __any_sync(kAllLanes, value == 0);
  mine[8] = u32(__reduce_max_sync(kAllLanes, i32(value)));
  atomicAdd(cells + 0, value);
  atomicOr(cells + 1, value);
  atomicAnd(cells + 2, value);
  atomicMax(cells + 3, value);
  atomicMin(cells + 4, value);
  atomicXor(cells + 5, value);
  if (lane == 7) atomicExch(cells + 6, value);
  u32 seen = cells[7];
  while (true) {
    const u32 old = atomicCAS(cells + 7, seen, seen + 1);
    if (old == seen) break;
    seen = old;
  }
  atomicMax(wide, u64(value) << 16);
}

// A lane updates what others read before a __syncwarp; rounds follow each other.
extern "C" __global__ void __launch_bounds__(32) read_then_update(u32* out) {
  SHARED(u32, smem_words, 32);
  const u32 lane = threadIdx.x;
  smem_words[lane] = lane;
  u32 sum = 0;
  for (u32 round = 0; round < 3; ++round) {
    __syncwarp();
    for (u32 i = 0; i < 32; ++i) sum += smem_words[i];
    __syncwarp();
    smem_words[(lane + round) % 32] += 1;
  }
  out[lane] = sum;
}
