// Copies that are under way while others are used, through both engines, and with faults.
#include "async.cuh"

constexpr u32 kTile = 128;  // words
constexpr u32 kStages = 3;

// out[i] = sum of the words of tile i; tiles are staged by cp.async, `kAhead` of them under way. The last tile may be
// short. Macros plant faults: WAIT, the groups that may be under way when a tile is read; AGAIN, whether a barrier
// protects a tile from the copy that follows it.
#ifndef WAIT
#define WAIT 2
#endif
#ifndef AGAIN
#define AGAIN 1
#endif
extern "C" __global__ void __launch_bounds__(kTile) sum_staged(const u32* words, u32 n, u32* sums) {
  SHARED(u32, smem_tiles, kStages * kTile);
  const u32 tiles = (n + kTile - 1) / kTile, thread = threadIdx.x;
  const auto load = [&](u32 tile) {
    const u32 at = tile * kTile + thread;
    if (tile < tiles)
      copy_async_part<4>(smem_tiles + tile % kStages * kTile + thread, words + min(at, n - 1), at < n ? 4 : 0);
    commit_copies();
  };
  for (u32 tile = 0; tile < kStages; ++tile) load(tile);
  for (u32 tile = 0; tile < tiles; ++tile) {
    await_copies<WAIT>();
    __syncthreads();
    if (thread < kWarp) {
      u32 sum = 0;
      for (u32 i = thread; i < kTile; i += kWarp) sum += smem_tiles[tile % kStages * kTile + i];
      sum = __reduce_add_sync(kAllLanes, sum);
      if (thread == 0) sums[tile] = sum;
    }
    if (AGAIN) __syncthreads();
    load(tile + kStages);
  }
}

#if defined(BITFORBIT_CUDA_SHIM) || __CUDA_ARCH__ >= 900
// The same by the copy engine: warp 0 brings tiles, the others take turns; n is a multiple of the tile. EMPTY: whether
// the producer waits until a stage has been read; BYTES: what it announces.
#ifndef EMPTY
#define EMPTY 1
#endif
#ifndef BYTES
#define BYTES (4 * kTile)
#endif
extern "C" __global__ void __launch_bounds__(96) sum_bulk(const u32* words, u32 n, u32* sums) {
  SHARED(u32, smem_tiles, kStages * kTile);
  SHARED(u64, smem_full, kStages);
  SHARED(u64, smem_empty, kStages);
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, tiles = n / kTile;
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < kStages; ++stage) {
      mbarrier_init(smem_full + stage, 1);
      mbarrier_init(smem_empty + stage, kWarp);
    }
    mbarrier_fence();
  }
  __syncthreads();
  if (warp == 0) {
    for (u32 tile = 0; tile < tiles && lane == 0; ++tile) {
      const u32 stage = tile % kStages, round = tile / kStages;
      if (EMPTY && round > 0) mbarrier_wait(smem_empty + stage, (round - 1) % 2);
      mbarrier_arrive_expect(smem_full + stage, BYTES);
      copy_bulk(smem_tiles + stage * kTile, words + tile * kTile, 4 * kTile, smem_full + stage);
    }
    return;
  }
  for (u32 tile = warp - 1; tile < tiles; tile += 2) {
    const u32 stage = tile % kStages;
    mbarrier_wait(smem_full + stage, tile / kStages % 2);
    u32 sum = 0;
    for (u32 i = lane; i < kTile; i += kWarp) sum += smem_tiles[stage * kTile + i];
    mbarrier_arrive(smem_empty + stage);
    sum = __reduce_add_sync(kAllLanes, sum);
    if (lane == 0) sums[tile] = sum;
  }
}
#endif
