// Decodes rows of a planes matrix. A thread block takes a chunk: up to 128 groups of one block of 16 rows.
//
// BITFORBIT_KIND names the float (see planes_floats.cuh). Outline: the chunk's part of the tails is copied to shared
// memory; its digits become exponents there, innermost level first; then every thread makes 4 x 16 weights: those of a
// level-1 digit 3 take the next exponent of level 2. The index of planes_index says where a chunk's digits begin.
//
// Four lanes share a group; lane q has its positions 16q to 16q + 15, in the order in which they take digits. A warp
// has 32 groups in a row, eight at a time (a slot): 8 rows of a tile, so that a lane's slots are 8 rows or a tile
// apart.
#include "planes_exponents.cuh"
#include "planes_floats.cuh"

constexpr u32 kThreads = 128;
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kSlotGroups = kWarp / kGroupLanes;
constexpr u32 kSlots = kChunkGroups / (kWarps * kSlotGroups);
constexpr u32 kOutOfRange = 2;  // bit of *status
// Blocks per multiprocessor that registers must leave room for: as many as fit without spills.
constexpr u32 kMinBlocks = kKind == kF32 ? 4 : kKind == kF16 ? 5 : kItem == 2 || kKind == kF8E4M3 ? 7 : 6;
static_assert(kSlots == 4, "slots are counted in pairs of 16 bits, stored in pairs of 8 rows");

// What a chunk can need at most: its 3s begin and end anywhere in a group, so each level below spans one group more.
constexpr u32 kLevel2Groups = kChunkGroups + 1;
constexpr u32 kLevel3Groups = kLevel2Groups + 2;
constexpr u32 kRawBytes = kLevel3Groups * kGroup;
constexpr u32 kWindowBytes = 16;  // that reading exponents may touch behind the last one

// What the lanes of a chunk share. Raw exponents are done with when those of level 2 are written: one place for both.
struct Shared {
  u32* level2;     // [4 * kLevel2Groups] digits
  u32* level3;     // [4 * kLevel3Groups] digits
  u8* exponents3;  // by level-3 digit
  u8* exponents2;  // by level-2 digit; before: raw exponents
  u32* counts;     // [kWarps] 3s of level 1
  u32* tables;     // [4] exponents of levels 1, 2, 3, in bytes 0-2; all are placed (place_exponents)
};

#define PLANES_SHARED(name)                              \
  SHARED(u32, smem_level2, 4 * kLevel2Groups);           \
  SHARED(u32, smem_level3, 4 * kLevel3Groups);           \
  SHARED(u8, smem_exponents3, kRawBytes + kWindowBytes); \
  SHARED(u8, smem_exponents2, kRawBytes + kWindowBytes); \
  SHARED(u32, smem_counts, kWarps);                      \
  SHARED(u32, smem_tables, 4);                           \
  const Shared name { smem_level2, smem_level3, smem_exponents3, smem_exponents2, smem_counts, smem_tables }

// The tails from some byte on, at any alignment, as words; zeros behind their end.
struct TailWords {
  const u32* gmem;
  u32 readable, shift;

  __device__ __forceinline__ TailWords(const u32* gmem_tails, u64 tails_words, u64 begin)
      : gmem(gmem_tails + begin / 4), shift(8 * static_cast<u32>(begin)) {
    const u64 left = begin / 4 < tails_words ? tails_words - begin / 4 : 0;
    readable = static_cast<u32>(min(left, static_cast<u64>(1u << 30)));
  }
  __device__ __forceinline__ u32 load(u32 i) const {
    const u32 low = i < readable ? gmem[i] : 0, high = i + 1 < readable ? gmem[i + 1] : 0;
    return __funnelshift_r(low, high, shift);
  }
};

// Copies words to shared memory, the first kAtOnce per thread with all loads under way together.
template <u32 kAtOnce, bool kExponents>
__device__ __forceinline__ void copy_tails(const TailWords& from, u32 words, u32 first, u32 step, u32* smem_out) {
  u32 word[kAtOnce];
#pragma unroll
  for (u32 i = 0; i < kAtOnce; ++i) word[i] = first + i * step < words ? from.load(first + i * step) : 0;
#pragma unroll
  for (u32 i = 0; i < kAtOnce; ++i) {
    if (first + i * step < words) smem_out[first + i * step] = kExponents ? place_exponents(word[i]) : word[i];
  }
#pragma unroll 1
  for (u32 i = first + kAtOnce * step; i < words; i += step) {
    smem_out[i] = kExponents ? place_exponents(from.load(i)) : from.load(i);
  }
}

// Eight groups of a tail level to exponents, from group `first` on. Returns the number of 3s up to and with each
// lane's.
__device__ __forceinline__ u32 expand8(const u32* smem_digits, u32 first, u32 groups, u32 table, const u8* smem_next,
                                       u32 next_at, u8* smem_out, u32 lane) {
  const u32 group = min(first + lane / kGroupLanes, groups - 1);  // lanes without a group repeat the last one
  const Digits digits = unpack_digits(reinterpret_cast<const uint4*>(smem_digits)[group], lane % kGroupLanes);
  const u32 count = count_threes(digits);
  const u32 inclusive = warp_inclusive_sum32(count, lane);
  if (first + lane / kGroupLanes < groups) {
    reinterpret_cast<uint4*>(smem_out)[kGroupLanes * first + lane] =
        exponents16(digits, smem_next, next_at + inclusive - count, table);
  }
  return inclusive;
}

// What reading a window may touch behind the last group.
__device__ __forceinline__ void clear_behind(u8* smem_exponents, u32 groups) {
  reinterpret_cast<uint4*>(smem_exponents)[kGroupLanes * groups] = make_uint4(0, 0, 0, 0);
}

// Level 3, by one warp: few groups, unless the data is hostile.
__device__ __forceinline__ void expand_level3(const Shared& smem, u32 groups, u32 lane) {
  const u32 table = smem.tables[2];
  u32 at = 0;
#pragma unroll 1
  for (u32 first = 0; first < groups; first += kSlotGroups) {
    const u32 inclusive = expand8(smem.level3, first, groups, table, smem.exponents2, at, smem.exponents3, lane);
    at = min(at + __shfl_sync(kAllLanes, inclusive, kWarp - 1), kRawBytes - kSlotGroups * kGroup);
  }
  if (lane == 0) clear_behind(smem.exponents3, groups);
}

// Level 2, by all warps; the first 3 takes byte `at` of the exponents of level 3.
__device__ __forceinline__ void expand_level2(const Shared& smem, u32 groups, u32 at, u32 lane, u32 warp) {
  const u32 table = smem.tables[1];
#pragma unroll 1
  for (u32 first = warp * kSlotGroups; first < groups; first += kWarps * kSlotGroups) {
    u32 before = 0;
#pragma unroll 1
    for (u32 i = lane; i < 4 * first; i += kWarp) before += __popc(threes(smem.level2[i]));
    expand8(smem.level2, first, groups, table, smem.exponents3, at + warp_sum(before), smem.exponents2, lane);
  }
  if (threadIdx.x == 0) clear_behind(smem.exponents2, groups);
}

// Where the weights of a lane go. Rows [begin, end) of the matrix are those of gmem_out [end - begin, cols]; `unit`:
// bytes, a power of two that divides the address of every row there.
struct Output {
  u8* gmem_out;
  u64 begin, end;
  u32 cols, unit;

  __device__ __forceinline__ u8* at(u64 row, u32 col) const { return gmem_out + ((row - begin) * cols + col) * kItem; }
  __device__ __forceinline__ bool wants(u64 row) const { return row >= begin && row < end; }
};

// Weights of a group of the edge run: row-major over the columns behind the last tile.
__device__ __forceinline__ void store_edge(const Output& out, const Weights& weights, u64 first_row, u32 block_rows,
                                           u32 edge_group, u32 q) {
  const u32 edge_cols = out.cols % kGroup;
#pragma unroll
  for (u32 run = 0; run < kRuns; ++run) {
    const u32 element = edge_group * kGroup + natural_index(q, 8 * run);
    u32 row = element / edge_cols, col = element % edge_cols;
#pragma unroll
    for (u32 i = 0; i < kLaneWeights / kRuns; ++i) {
      if (row < block_rows && out.wants(first_row + row)) {
        store_weight(out.at(first_row + row, out.cols - edge_cols + col), weights, run * (kLaneWeights / kRuns) + i);
      }
      if (++col == edge_cols) col = 0, ++row;
    }
  }
}

// The wanted rows of chunk blockIdx.x of a block of that many rows and groups; a whole block has full_groups. kOneRow:
// one row is wanted, so that sign and mantissa are loaded where it is found.
template <bool kOneRow>
__device__ __forceinline__ void decode_chunk(const Shared& smem, const u8* gmem_code, const u8* gmem_digits,
                                             const u8* gmem_planes, u64 plane1, u64 plane2, const u32* gmem_tails,
                                             u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u64 block,
                                             u32 block_rows, u32 groups, u32 full_groups, const Output& out) {
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, q = lane % kGroupLanes;
  const u64* start = gmem_starts + kStartWords * block;
  const uint4* entry = reinterpret_cast<const uint4*>(gmem_index) + block * (gridDim.x + 1) + blockIdx.x;
  const uint4 here = entry[0], next = entry[1];

  // Level 1. Lanes without a group repeat the block's last one: nothing comes after them.
  const u64 first_group = block * full_groups;
  const u32 group = blockIdx.x * kChunkGroups + warp * kSlots * kSlotGroups + lane / kGroupLanes;
  const uint4* gmem_block_digits = reinterpret_cast<const uint4*>(gmem_digits) + first_group;
  const Planes planes(gmem_planes, plane1, plane2, first_group);
  uint4 packed[kSlots];
  Fields fields[kSlots];
#pragma unroll
  for (u32 s = 0; s < kSlots; ++s) {
    const u32 number = min(group + s * kSlotGroups, groups - 1);
    packed[s] = load_once(gmem_block_digits + number);
    if constexpr (!kOneRow) fields[s] = planes.load(number, q);
  }

  // Tails: whole groups of digits from where the entry says, and one more, in which the last 3s may end.
  const u32 level2_groups = min((next.x + kGroup - 1) / kGroup - here.x / kGroup, kLevel2Groups);
  if (warp == kWarps - 1) {
    const u32 level3_groups = min(next.y / kGroup + 2 - here.y / kGroup, kLevel3Groups);
    const u32 raw_bytes = min(next.z - here.z + 2 * kGroup, kRawBytes);
    const TailWords level3(gmem_tails, tails_words, start[1] + here.y / kGroup * kDigitBytes);
    const TailWords raw(gmem_tails, tails_words, start[2] + here.z);
    if (lane == 0) {
      // Table bytes: level 1 at 0, level 2 at 3, level 3 at 6; of each four, the last is never looked up.
      const uint4 table = *reinterpret_cast<const uint4*>(gmem_code + start[3] * kTableBytes);
      smem.tables[0] = place_exponents(table.x);
      smem.tables[1] = place_exponents(__funnelshift_r(table.x, table.y, 24));
      smem.tables[2] = place_exponents(__funnelshift_r(table.y, table.z, 16));
    }
    copy_tails<2, false>(level3, 4 * level3_groups, lane, kWarp, smem.level3);
    copy_tails<2, true>(raw, (raw_bytes + kWindowBytes) / 4, lane, kWarp, reinterpret_cast<u32*>(smem.exponents2));
    __syncwarp();
    expand_level3(smem, level3_groups, lane);
  } else {
    const TailWords level2(gmem_tails, tails_words, start[0] + here.x / kGroup * kDigitBytes);
    copy_tails<2, false>(level2, 4 * level2_groups, threadIdx.x, kThreads - kWarp, smem.level2);
  }

  // Sums over lanes of the 3s in slots 0 and 1, 2 and 3, each in 16 bits.
  Digits digits[kSlots];
  u32 count[kSlots];
#pragma unroll
  for (u32 s = 0; s < kSlots; ++s) {
    digits[s] = unpack_digits(packed[s], q);
    count[s] = count_threes(digits[s]);
  }
  const u32 sum01 = warp_inclusive_sum32(count[0] | count[1] << 16, lane);
  const u32 sum23 = warp_inclusive_sum32(count[2] | count[3] << 16, lane);
  const u32 total01 = __shfl_sync(kAllLanes, sum01, kWarp - 1), total23 = __shfl_sync(kAllLanes, sum23, kWarp - 1);
  const u32 total0 = total01 & 0xFFFF, total1 = total0 + (total01 >> 16), total2 = total1 + (total23 & 0xFFFF);
  if (lane == 0) smem.counts[warp] = total2 + (total23 >> 16);
  __syncthreads();
  expand_level2(smem, level2_groups, here.y % kGroup, lane, warp);
  __syncthreads();
  const u32 table = smem.tables[0];

  u32 before = here.x % kGroup;
#pragma unroll
  for (u32 w = 0; w + 1 < kWarps; ++w) before += w < warp ? smem.counts[w] : 0;
  const u32 at[kSlots] = {before + (sum01 & 0xFFFF) - count[0], before + total0 + (sum01 >> 16) - count[1],
                          before + total1 + (sum23 & 0xFFFF) - count[2], before + total2 + (sum23 >> 16) - count[3]};
  const u32 tile_groups = out.cols / kGroup * block_rows;
  const u64 first_row = block * kBlockRows;
  // Whole tiles of 16 rows, all of them wanted, stores of 16 bytes: what most chunks are.
  const bool plain = out.unit == 16 && block_rows == kBlockRows && (blockIdx.x + 1) * kChunkGroups <= tile_groups &&
                     out.wants(first_row) && out.wants(first_row + (kBlockRows - 1));
  if (!kOneRow && plain) {
    u8* gmem_row = out.at(first_row + lane / kGroupLanes, group / kBlockRows * kGroup);
    u8* gmem_eighth = gmem_row + static_cast<u64>(out.cols) * (kSlotGroups * kItem);
#pragma unroll
    for (u32 s = 0; s < kSlots; ++s) {
      const Weights weights = join(exponents16(digits[s], smem.exponents2, at[s], table), fields[s]);
      store_weights((s % 2 == 0 ? gmem_row : gmem_eighth) + s / 2 * kGroup * kItem, weights, q, 16);
    }
    return;
  }
#pragma unroll
  for (u32 s = 0; s < kSlots; ++s) {
    const u32 number = group + s * kSlotGroups;
    if (number >= groups) break;
    const u32 tile = block_rows == kBlockRows ? number / kBlockRows : number / block_rows;
    const u64 row = first_row + (number - tile * block_rows);
    if (number < tile_groups && !out.wants(row)) continue;
    if constexpr (kOneRow) fields[s] = planes.load(number, q);
    const Weights weights = join(exponents16(digits[s], smem.exponents2, at[s], table), fields[s]);
    if (number < tile_groups) {
      store_weights(out.at(row, tile * kGroup), weights, q, out.unit);
    } else {
      store_edge(out, weights, first_row, block_rows, number - tile_groups, q);
    }
  }
}

// Grid: chunks of a block, blocks from first_block on.
extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    planes_decode(const u8* gmem_code, const u8* gmem_digits, const u8* gmem_planes, u64 plane1, u64 plane2,
                  const u32* gmem_tails, u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u32 cols,
                  u32 full_groups, u64 blocks, u32 last_rows, u32 last_groups, u64 first_block, u64 begin, u64 end,
                  u8* gmem_out, u32 unit) {
  PLANES_SHARED(smem);
  const Output out{gmem_out, begin, end, cols, unit};
  const u64 block = first_block + blockIdx.y;
  const bool last = block + 1 == blocks;
  decode_chunk<false>(smem, gmem_code, gmem_digits, gmem_planes, plane1, plane2, gmem_tails, tails_words, gmem_starts,
                      gmem_index, block, last ? last_rows : kBlockRows, last ? last_groups : full_groups, full_groups,
                      out);
}

// Grid: chunks of a block, ids from first_id on. An id outside of the matrix gives a row of zeros.
extern "C" __global__ void __launch_bounds__(kThreads, kMinBlocks)
    planes_rows(const u8* gmem_code, const u8* gmem_digits, const u8* gmem_planes, u64 plane1, u64 plane2,
                const u32* gmem_tails, u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u32 cols,
                u32 full_groups, u64 blocks, u32 last_rows, u32 last_groups, const u8* gmem_ids, u32 id_bytes,
                u64 first_id, u8* gmem_out, u32 unit, u32* gmem_status) {
  PLANES_SHARED(smem);
  const u64 number = first_id + blockIdx.y;
  const i64 id = id_bytes == 8 ? reinterpret_cast<const i64*>(gmem_ids)[number]
                               : static_cast<i64>(reinterpret_cast<const i32*>(gmem_ids)[number]);
  u8* gmem_row = gmem_out + number * cols * kItem;
  if (id < 0 || static_cast<u64>(id) >= (blocks - 1) * kBlockRows + last_rows) {
    const u64 row_bytes = static_cast<u64>(cols) * kItem;
    const u64 step = static_cast<u64>(gridDim.x) * kThreads;
    for (u64 i = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x; i < row_bytes; i += step) gmem_row[i] = 0;
    if (threadIdx.x == 0 && gmem_status != nullptr) atomicOr(gmem_status, kOutOfRange);
    return;
  }
  const u64 row = static_cast<u64>(id), block = row / kBlockRows;
  const Output out{gmem_row, row, row + 1, cols, unit};
  const bool last = block + 1 == blocks;
  decode_chunk<true>(smem, gmem_code, gmem_digits, gmem_planes, plane1, plane2, gmem_tails, tails_words, gmem_starts,
                     gmem_index, block, last ? last_rows : kBlockRows, last ? last_groups : full_groups, full_groups,
                     out);
}
