// Where everything is that decoding a chunk of a block needs: a pass over the digits, once per tensor.
//
// planes_starts: one thread block; where each block's tail begins, an exclusive scan over the blocks' counts.
// planes_index: a thread block per block; for each of its chunks (kChunkGroups groups), as entry {a, c, e, 0}:
//   a: 3s among the level-1 digits before the chunk, which is where its level-2 digits begin;
//   c: 3s among the level-2 digits of the groups before that of digit a;
//   e: 3s among the level-3 digits of the groups before that of digit c.
// One entry more than chunks ends each block. All counts are of digits that are there: whatever the parts contain, an
// index leads to places inside of them, or behind their end, where decoding looks before it reads.
#include "planes_common.cuh"

constexpr u32 kCorrupt = 1;  // bit of *status
constexpr u32 kScanThreads = 1024;
constexpr u32 kIndexThreads = 256;
constexpr u32 kIndexWarps = kIndexThreads / kWarp;

struct Counts {
  u32 level2, level3, raw;
};

// The counts of a block, at most what its positions allow.
__device__ __forceinline__ Counts bounded_counts(const u8* gmem_counts, u64 block, u64 positions, bool* sound) {
  const u32* entry = reinterpret_cast<const u32*>(gmem_counts + block * kCountBytes);
  Counts n{entry[0], entry[1], entry[2]};
  *sound = n.level2 <= positions && n.level3 <= n.level2 && n.raw <= n.level3;
  if (n.level2 > positions) n.level2 = static_cast<u32>(positions);
  n.level3 = min(n.level3, n.level2);
  n.raw = min(n.raw, n.level3);
  return n;
}

__device__ __forceinline__ u64 digit_groups(u32 digits) { return (static_cast<u64>(digits) + kGroup - 1) / kGroup; }

// gmem_starts [blocks][kStartWords]: byte offsets in the tails of level 2, level 3 and raw exponents; number of the
// table.
extern "C" __global__ void __launch_bounds__(1024)
    planes_starts(const u8* gmem_counts, u64 blocks, u32 groups, u32 last_groups, u32 blocks_per_table, u64 tails_bytes,
                  u64* gmem_starts, u32* gmem_status) {
  SHARED(u64, smem_sums, kScanThreads / kWarp);
  const u32 thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  u64 begin = 0;
  bool all_sound = true;
  for (u64 first = 0; first < blocks; first += kScanThreads) {
    const u64 block = first + thread;
    u64 level2_bytes = 0, level3_bytes = 0, bytes = 0;
    if (block < blocks) {
      bool sound = true;
      const u64 positions = static_cast<u64>(block + 1 < blocks ? groups : last_groups) * kGroup;
      const Counts n = bounded_counts(gmem_counts, block, positions, &sound);
      all_sound = all_sound && sound;
      level2_bytes = digit_groups(n.level2) * kDigitBytes;
      level3_bytes = digit_groups(n.level3) * kDigitBytes;
      bytes = level2_bytes + level3_bytes + n.raw;
    }
    const u64 inclusive = warp_inclusive_sum(bytes, lane);
    if (lane == kWarp - 1) smem_sums[warp] = inclusive;
    __syncthreads();
    const u64 sums = warp_inclusive_sum(smem_sums[lane], lane);
    const u64 before = __shfl_sync(kAllLanes, sums, static_cast<int>(warp)) - smem_sums[warp];
    if (block < blocks) {
      u64* start = gmem_starts + kStartWords * block;
      start[0] = begin + before + inclusive - bytes;
      start[1] = start[0] + level2_bytes;
      start[2] = start[1] + level3_bytes;
      start[3] = block / blocks_per_table;
    }
    begin += __shfl_sync(kAllLanes, sums, kWarp - 1);
    __syncthreads();
  }
  if (!all_sound || (thread == 0 && (begin + 63) / 64 * 64 != tails_bytes)) {
    if (gmem_status != nullptr) atomicOr(gmem_status, kCorrupt);
  }
}

// Word `index` of the tails, from byte offset `begin`, which may be any; zero behind the end.
__device__ __forceinline__ u32 tails_word(const u32* gmem_tails, u64 tails_words, u64 begin, u64 index) {
  const u64 at = begin / 4 + index;
  const u32 low = at < tails_words ? gmem_tails[at] : 0;
  const u32 high = at + 1 < tails_words ? gmem_tails[at + 1] : 0;
  return __funnelshift_r(low, high, 8 * (begin % 4));
}

// Turns the counts in the index (word `level` of each entry) into sums of those before; the last entry gets the total.
__device__ __forceinline__ void scan_entries(u32* gmem_index, u32 level, u32 chunks, u32* smem_sums) {
  const u32 thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  u32 begin = 0;
  for (u32 first = 0; first <= chunks; first += kIndexThreads) {
    const u32 chunk = first + thread;
    const u32 count = chunk < chunks ? gmem_index[4 * chunk + level] : 0;
    const u32 inclusive = warp_inclusive_sum(count, lane);
    if (lane == kWarp - 1) smem_sums[warp] = inclusive;
    __syncthreads();
    u32 before = begin;
    for (u32 w = 0; w < kIndexWarps; ++w) {
      if (w < warp) before += smem_sums[w];
      begin += smem_sums[w];
    }
    if (chunk <= chunks) gmem_index[4 * chunk + level] = before + inclusive - count;
    __syncthreads();
  }
}

// Counts the 3s among the tail's digits: those of the groups between where this chunk's and the next one's digits
// begin.
__device__ __forceinline__ void count_tail(const u32* gmem_tails, u64 tails_words, u64 begin, u64 end_group, u32 level,
                                           u32 chunks, u32* gmem_index) {
  const u32 lane = threadIdx.x % kWarp;
  for (u32 chunk = threadIdx.x / kWarp; chunk < chunks; chunk += kIndexWarps) {
    const u64 from = gmem_index[4 * chunk + level - 1] / kGroup;
    const u64 next = gmem_index[4 * (chunk + 1) + level - 1] / kGroup;
    // The last chunk takes what is left, so that the total is that of all digits.
    const u64 to = chunk + 1 < chunks ? min(next, end_group) : end_group;
    u32 count = 0;
    for (u64 i = 4 * from + lane; i < 4 * to; i += kWarp) {
      count += __popc(threes(tails_word(gmem_tails, tails_words, begin, i)));
    }
    count = warp_sum(count);
    if (lane == 0) gmem_index[4 * chunk + level] = count;
  }
  __syncthreads();
}

// gmem_index [blocks][chunks + 1][4]; chunks is that of a whole block, 16 rows.
extern "C" __global__ void __launch_bounds__(256)
    planes_index(const u8* gmem_counts, const u8* gmem_digits, const u32* gmem_tails, u64 tails_words,
                 const u64* gmem_starts, u64 first_block, u64 blocks, u32 groups, u32 last_groups, u32 chunks,
                 u32* gmem_index, u32* gmem_status) {
  SHARED(u32, smem_sums, kIndexWarps);
  const u32 thread = threadIdx.x, lane = thread % kWarp;
  const u64 block = first_block + blockIdx.x;
  const u32 block_groups = block + 1 < blocks ? groups : last_groups;
  bool sound = true;
  const Counts n = bounded_counts(gmem_counts, block, static_cast<u64>(block_groups) * kGroup, &sound);
  const uint4* digits = reinterpret_cast<const uint4*>(gmem_digits) + block * groups;
  const u64* start = gmem_starts + kStartWords * block;
  u32* index = gmem_index + 4 * block * (chunks + 1);

  for (u32 chunk = thread / kWarp; chunk < chunks; chunk += kIndexWarps) {
    u32 count = 0;
    for (u32 g = lane; g < kChunkGroups; g += kWarp) {
      const u32 group = chunk * kChunkGroups + g;
      if (group < block_groups) count += count_threes(digits[group]);
    }
    count = warp_sum(count);
    if (lane == 0) index[4 * chunk] = count;
  }
  __syncthreads();
  scan_entries(index, 0, chunks, smem_sums);
  count_tail(gmem_tails, tails_words, start[0], digit_groups(n.level2), 1, chunks, index);
  scan_entries(index, 1, chunks, smem_sums);
  count_tail(gmem_tails, tails_words, start[1], digit_groups(n.level3), 2, chunks, index);
  scan_entries(index, 2, chunks, smem_sums);
  if (thread == 0) {
    const u32* end = index + 4 * chunks;
    if (end[0] != n.level2 || end[1] != n.level3 || end[2] != n.raw) {
      if (gmem_status != nullptr) atomicOr(gmem_status, kCorrupt);
    }
  }
}
