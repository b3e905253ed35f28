// Decodes rows of a planes matrix. A thread block takes a chunk: up to 64 groups of 64 weights of one block of 16 rows.
//
// BITFORBIT_KIND names the float (see planes_floats.cuh). Outline: the chunk's part of the tails is copied to shared
// memory; its digits become exponents there, innermost level first; then every thread makes 16 weights: those of a
// level-1 digit 3 take the next exponent of level 2. Where a chunk's digits begin, the index of planes_index says.
// Four threads share a group; thread q has its positions 16q to 16q + 15, in the order in which they take digits.
#include "planes_exponents.cuh"
#include "planes_floats.cuh"

constexpr u32 kThreads = kChunkGroups * kGroupLanes;
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kGroupsPerWarp = kWarp / kGroupLanes;
constexpr u32 kOutOfRange = 2;  // bit of *status

// What a chunk can need at most: its 3s begin and end anywhere in a group, so the levels below span one group more
// each.
constexpr u32 kLevel2Groups = kChunkGroups + 1;
constexpr u32 kLevel3Groups = kLevel2Groups + 2;
constexpr u32 kRawBytes = kLevel3Groups * kGroup;
constexpr u32 kWindowBytes = 16;  // that reading exponents may touch behind the last one

// What the lanes of a chunk share. Raw exponents are done with when those of level 2 are written: one place for both.
struct Shared {
  u32* level2;      // [4 * kLevel2Groups] digits
  u32* level3;      // [4 * kLevel3Groups] digits
  u32* exponents3;  // bytes, by level-3 digit
  u32* exponents2;  // bytes, by level-2 digit; before: raw exponents
  u32* counts;      // [kWarps] 3s of level 1
};

#define PLANES_SHARED(name)                                                  \
  SHARED(u32, smem_level2, 4 * kLevel2Groups);                               \
  SHARED(u32, smem_level3, 4 * kLevel3Groups);                               \
  SHARED(u32, smem_exponents3, (kLevel3Groups * kGroup + kWindowBytes) / 4); \
  SHARED(u32, smem_exponents2, (kRawBytes + kWindowBytes) / 4);              \
  SHARED(u32, smem_counts, kWarps);                                          \
  const Shared name { smem_level2, smem_level3, smem_exponents3, smem_exponents2, smem_counts }

// Copies words from any byte offset of the tails; zeros from behind their end.
__device__ __forceinline__ void copy_tails(const u32* gmem_tails, u64 tails_words, u64 begin, u32 words, u32 first,
                                           u32 step, u32* smem_out) {
  const u32 shift = 8 * (begin % 4);
  for (u32 i = first; i < words; i += step) {
    const u64 at = begin / 4 + i;
    const u32 low = at < tails_words ? gmem_tails[at] : 0;
    const u32 high = at + 1 < tails_words ? gmem_tails[at + 1] : 0;
    smem_out[i] = __funnelshift_r(low, high, shift);
  }
}

// Digits of a tail level to exponents: the first 3 takes byte `next_at` of `smem_next`.
__device__ __forceinline__ void expand_level(const u32* smem_digits, u32 groups, u32 table, const u32* smem_next,
                                             u32 next_at, u32* smem_out) {
  const u32 lane = threadIdx.x % kWarp;
  for (u32 first = threadIdx.x / kWarp * kGroupsPerWarp; first < groups; first += kWarps * kGroupsPerWarp) {
    u32 before = 0;
    for (u32 i = lane; i < 4 * first; i += kWarp) before += __popc(threes(smem_digits[i]));
    before = first == 0 ? 0 : warp_sum(before);
    const u32 group = first + lane / kGroupLanes;
    uint4 packed{0, 0, 0, 0};
    if (group < groups) packed = reinterpret_cast<const uint4*>(smem_digits)[group];
    const Digits digits = unpack_digits(packed, lane % kGroupLanes);
    const u32 count = count_threes(digits);
    const u32 at = next_at + before + warp_inclusive_sum(count, lane) - count;
    const uint4 exponents = exponents16(digits, smem_next, at, table);
    if (group < groups) reinterpret_cast<uint4*>(smem_out)[kGroupLanes * first + lane] = exponents;
  }
}

// Rows [begin, end) of chunk blockIdx.x of a block, to gmem_out [end - begin, cols]. `unit`: bytes, a power of two that
// divides the address of every row of the output.
__device__ __forceinline__ void decode_chunk(const Shared& smem, const u8* gmem_code, const u8* gmem_digits,
                                             const u8* gmem_planes, u64 plane1, u64 plane2, const u32* gmem_tails,
                                             u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u32 chunks,
                                             u64 rows, u32 cols, u64 block, u64 begin, u64 end, u8* gmem_out,
                                             u32 unit) {
  const u32 thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp, q = thread % kGroupLanes;
  const u64* start = gmem_starts + kStartWords * block;
  const uint4* entry = reinterpret_cast<const uint4*>(gmem_index) + block * (chunks + 1) + blockIdx.x;
  const uint4 here = entry[0], next = entry[1];

  // This thread's group.
  const u64 first_row = block * kBlockRows;
  const u32 block_rows = static_cast<u32>(min(static_cast<u64>(kBlockRows), rows - first_row));
  const u32 group = blockIdx.x * kChunkGroups + thread / kGroupLanes;
  const bool inside = group < groups_in(block_rows, cols);
  const u64 number = block * groups_in(kBlockRows, cols) + group;
  uint4 packed{0, 0, 0, 0};
  if (inside) packed = load_once(reinterpret_cast<const uint4*>(gmem_digits) + number);
  Fields fields{};
  if (inside) fields = load_fields(gmem_planes, plane1, plane2, number, q);

  // Tails: whole groups of digits from where the entry says, and one more, in which the last 3s may end.
  const u32 level2_groups = min((next.x + kGroup - 1) / kGroup - here.x / kGroup, kLevel2Groups);
  const u32 level3_groups = min(next.y / kGroup + 2 - here.y / kGroup, kLevel3Groups);
  const u32 raw_bytes = min(next.z - here.z + 2 * kGroup, kRawBytes);
  if (warp == kWarps - 1) {
    copy_tails(gmem_tails, tails_words, start[1] + here.y / kGroup * kDigitBytes, 4 * level3_groups, lane, kWarp,
               smem.level3);
  } else if (warp == kWarps - 2) {
    copy_tails(gmem_tails, tails_words, start[2] + here.z, (raw_bytes + 3) / 4, lane, kWarp, smem.exponents2);
  } else {
    copy_tails(gmem_tails, tails_words, start[0] + here.x / kGroup * kDigitBytes, 4 * level2_groups, thread,
               kThreads - 2 * kWarp, smem.level2);
  }

  const u8* gmem_table = gmem_code + start[3] * kTableBytes;
  const uint4 table = *reinterpret_cast<const uint4*>(gmem_table);
  const Digits digits = unpack_digits(packed, q);
  const u32 count = count_threes(digits);
  const u32 inclusive = warp_inclusive_sum(count, lane);
  if (lane == kWarp - 1) smem.counts[warp] = inclusive;
  __syncthreads();
  // Table bytes: level 1 at 0, level 2 at 3, level 3 at 6; of each four, the last is never looked up.
  expand_level(smem.level3, level3_groups, __funnelshift_r(table.y, table.z, 16), smem.exponents2, 0, smem.exponents3);
  __syncthreads();
  expand_level(smem.level2, level2_groups, __funnelshift_r(table.x, table.y, 24), smem.exponents3, here.y % kGroup,
               smem.exponents2);
  __syncthreads();
  u32 at = here.x % kGroup + inclusive - count;
  for (u32 w = 0; w < kWarps; ++w) at += w < warp ? smem.counts[w] : 0;
  if (!inside) return;
  const Weights weights = join(exponents16(digits, smem.exponents2, at, table.x), fields);

  const u32 tiles = cols / kGroup;
  if (group < tiles * block_rows) {
    const u32 tile = block_rows == kBlockRows ? group / kBlockRows : group / block_rows;
    const u64 row = first_row + (group - tile * block_rows);
    if (row >= begin && row < end) {
      u8* gmem_row = gmem_out + ((row - begin) * cols + static_cast<u64>(tile) * kGroup) * kItem;
      store_weights(gmem_row, weights, q, unit);
    }
  } else {
    const u32 edge_cols = cols % kGroup, edge_group = group - tiles * block_rows;
#pragma unroll
    for (u32 i = 0; i < kLaneWeights; ++i) {
      const u32 element = edge_group * kGroup + natural_index(q, i);
      const u64 row = first_row + element / edge_cols;
      if (element < edge_cols * block_rows && row >= begin && row < end) {
        const u64 at_element = (row - begin) * cols + tiles * kGroup + element % edge_cols;
        store_weight(gmem_out + at_element * kItem, weights, i);
      }
    }
  }
}

// Grid: chunks of a block, blocks from first_block on.
extern "C" __global__ void __launch_bounds__(256)
    planes_decode(const u8* gmem_code, const u8* gmem_digits, const u8* gmem_planes, u64 plane1, u64 plane2,
                  const u32* gmem_tails, u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u64 rows,
                  u32 cols, u64 first_block, u64 begin, u64 end, u8* gmem_out, u32 unit) {
  PLANES_SHARED(smem);
  decode_chunk(smem, gmem_code, gmem_digits, gmem_planes, plane1, plane2, gmem_tails, tails_words, gmem_starts,
               gmem_index, gridDim.x, rows, cols, first_block + blockIdx.y, begin, end, gmem_out, unit);
}

// Grid: chunks of a block, ids from first_id on. An id outside of the matrix gives a row of zeros.
extern "C" __global__ void __launch_bounds__(256)
    planes_rows(const u8* gmem_code, const u8* gmem_digits, const u8* gmem_planes, u64 plane1, u64 plane2,
                const u32* gmem_tails, u64 tails_words, const u64* gmem_starts, const u32* gmem_index, u64 rows,
                u32 cols, const u8* gmem_ids, u32 id_bytes, u64 first_id, u8* gmem_out, u32 unit, u32* gmem_status) {
  PLANES_SHARED(smem);
  const u64 number = first_id + blockIdx.y;
  const i64 id = id_bytes == 8 ? reinterpret_cast<const i64*>(gmem_ids)[number]
                               : static_cast<i64>(reinterpret_cast<const i32*>(gmem_ids)[number]);
  u8* gmem_row = gmem_out + number * cols * kItem;
  if (id < 0 || static_cast<u64>(id) >= rows) {
    const u64 row_bytes = static_cast<u64>(cols) * kItem;
    for (u64 i = blockIdx.x * kThreads + threadIdx.x; i < row_bytes; i += gridDim.x * kThreads) gmem_row[i] = 0;
    if (threadIdx.x == 0 && gmem_status != nullptr) atomicOr(gmem_status, kOutOfRange);
    return;
  }
  const u64 row = static_cast<u64>(id);
  decode_chunk(smem, gmem_code, gmem_digits, gmem_planes, plane1, plane2, gmem_tails, tails_words, gmem_starts,
               gmem_index, gridDim.x, rows, cols, row / kBlockRows, row, row + 1, gmem_row, unit);
}
