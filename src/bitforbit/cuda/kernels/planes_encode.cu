// Encodes a matrix in the `planes` format (docs/format.md, section 3), in three launches:
//
// 1. planes_histograms counts the exponents of a sample of the elements; the host chooses the code tables.
// 2. planes_count counts what each 16-row block leaves to the tail; the host adds up where each tail begins.
// 3. planes_write writes all parts but `code`, which the host makes.
//
// In 2 and 3 a thread block has 16 rows, which it walks in steps of kStepGroups groups, four lanes to a group.
#include "planes_encode.cuh"

constexpr u32 kThreads = 256;
constexpr u32 kStepGroups = kThreads / kGroupLanes;
constexpr u32 kWarps = kThreads / kWarp;

// How an exponent is written: [1:0], [3:2], [5:4] its digits of level 1, 2 and 3, zero where a level has none.
__device__ __forceinline__ u8 code_of_rank(u32 rank) {
  return static_cast<u8>(rank < 3 ? rank : rank < 6 ? 3 | (rank - 3) << 2 : rank < 9 ? 15 | (rank - 6) << 4 : 63);
}

// Codes by exponent, [256]: thread e makes that of exponent e. An exponent of several ranks has the lowest.
__device__ __forceinline__ void make_codes(const u8* table, u8* smem_codes) {
  u32 rank = kCodedRanks;
#pragma unroll
  for (u32 r = kCodedRanks; r-- > 0;) {
    if (table[r] == threadIdx.x) rank = r;
  }
  smem_codes[threadIdx.x] = code_of_rank(rank);
}

__device__ __forceinline__ u32 codes_of(u32 exponents, const u8* smem_codes) {
  return smem_codes[exponents & 255] | smem_codes[exponents >> 8 & 255] << 8 | smem_codes[exponents >> 16 & 255] << 16 |
         smem_codes[exponents >> 24] << 24;
}

// What a number of elements leave to each level of the tail, at most 2^21 - 1: [20:0] n2, [41:21] n3, [62:42] n4.
constexpr u32 kCountBits = 21;
constexpr u32 kCountMask = (1u << kCountBits) - 1;
__device__ __forceinline__ u32 count2(u64 counts) { return static_cast<u32>(counts) & kCountMask; }
__device__ __forceinline__ u32 count3(u64 counts) { return static_cast<u32>(counts >> kCountBits) & kCountMask; }
__device__ __forceinline__ u32 count4(u64 counts) { return static_cast<u32>(counts >> 2 * kCountBits); }

__device__ __forceinline__ u64 count(const u32 (&codes)[4]) {
  // Bits 0, 2 and 4 of a byte: the digit of level 1, 2, 3 is 3. Two words go into one.
  const u32 threes01 = (codes[0] & codes[0] >> 1 & 0x15151515) | (codes[1] & codes[1] >> 1 & 0x15151515) << 1;
  const u32 threes23 = (codes[2] & codes[2] >> 1 & 0x15151515) | (codes[3] & codes[3] >> 1 & 0x15151515) << 1;
  const u32 n2 = __popc(threes01 & 0x03030303) + __popc(threes23 & 0x03030303);
  const u32 n3 = __popc(threes01 & 0x0C0C0C0C) + __popc(threes23 & 0x0C0C0C0C);
  const u32 n4 = __popc(threes01 & 0x30303030) + __popc(threes23 & 0x30303030);
  return n2 | static_cast<u64>(n3) << kCountBits | static_cast<u64>(n4) << 2 * kCountBits;
}

// A thread block per histogram, of `unit` rows. Counted are, in row r, the chunks c of 64 columns with c % stride ==
// r % stride; `last_stride` is that of the last histogram. counts: [histograms, 256].
extern "C" __global__ void __launch_bounds__(256)
    planes_histograms(const u8* data, u64 row_bytes, u64 rows, u32 cols, u64 unit, u64 stride, u64 last_stride,
                      u32* counts) {
  SHARED(u32, smem_counts, kWarps * 256);
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (u32 w = 0; w < kWarps; ++w) smem_counts[w * 256 + threadIdx.x] = 0;
  __syncthreads();

  const bool last = blockIdx.x == gridDim.x - 1;
  const u64 begin = blockIdx.x * unit, end = last ? rows : begin + unit, step = last ? last_stride : stride;
  // Rows with a counted chunk: r % step is less than the number of chunks.
  const u64 chunks = (static_cast<u64>(cols) + kGroup - 1) / kGroup, residues = step < chunks ? step : chunks;
  const u64 candidates = ((end - 1) / step - begin / step + 1) * residues;
  for (u64 i = warp; i < candidates; i += kWarps) {
    const u64 residue = i % residues, row = (begin / step + i / residues) * step + residue;
    if (row < begin || row >= end) continue;
    for (u64 col = residue * kGroup; col < cols; col += step * kGroup) {
      for (u64 at = col + lane; at < cols && at < col + kGroup; at += kWarp) {
        const u32 exponent = load_element(data + row * row_bytes + at * kItem) >> kShift & kMask;
        atomicAdd(smem_counts + warp * 256 + exponent, 1u);
      }
    }
  }
  __syncthreads();

  u32 sum = 0;
  for (u32 w = 0; w < kWarps; ++w) sum += smem_counts[w * 256 + threadIdx.x];
  counts[static_cast<u64>(blockIdx.x) * 256 + threadIdx.x] = sum;
}

// counts: [blocks, 3], n2, n3 and n4 of each block.
extern "C" __global__ void __launch_bounds__(256)
    planes_count(const u8* data, u64 row_bytes, u64 rows, u32 cols, u64 rows_per_table, const u8* tables, u32* counts) {
  SHARED(u8, smem_codes, 256);
  SHARED(u32, smem_sums, 3);
  const BlockRows block(data, row_bytes, rows, cols, blockIdx.x);
  const u8* const table = tables + static_cast<u64>(blockIdx.x) * kBlockRows / rows_per_table * kTableBytes;
  make_codes(table, smem_codes);
  if (threadIdx.x < 3) smem_sums[threadIdx.x] = 0;
  __syncthreads();

  const u32 quarter = threadIdx.x % kGroupLanes, fill = static_cast<u32>(table[0]) << kShift, groups = block.groups();
  u32 n2 = 0, n3 = 0, n4 = 0;
  for (u32 group = threadIdx.x / kGroupLanes; group < groups; group += kStepGroups) {
    u32 words[kWords], codes[4];
    block.load<true>(group, quarter, fill, words);
    const Quarter values(words);
#pragma unroll
    for (u32 k = 0; k < 4; ++k) codes[k] = codes_of(values.exponents[k], smem_codes);
    const u64 counted = count(codes);
    n2 += count2(counted), n3 += count3(counted), n4 += count4(counted);
  }
  atomicAdd(smem_sums, n2);
  atomicAdd(smem_sums + 1, n3);
  atomicAdd(smem_sums + 2, n4);
  __syncthreads();
  if (threadIdx.x < 3) counts[static_cast<u64>(blockIdx.x) * 3 + threadIdx.x] = smem_sums[threadIdx.x];
}

// Sum of `value` over the threads before this one; `total`: over all. There must be a barrier between two calls.
__device__ __forceinline__ u64 exclusive_sum(u64 value, u64* smem_sums, u64& total) {
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const u64 sum = warp_inclusive_sum(value, lane);
  if (lane == kWarp - 1) smem_sums[warp] = sum;
  __syncthreads();
  u64 before = 0;
  total = 0;
#pragma unroll
  for (u32 w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += smem_sums[w];
  }
  return before + sum - value;
}

// Digits of one level wait in a stage, a ring of bytes whose bits [1:0] hold one each, until there are 64 for a group.
// A step adds at most 4096 to the 63 that may be left of the last one.
constexpr u32 kStage = 8192;

// Puts what a quarter leaves to the tail where it belongs; at2, at3 and at4 are how many came before it. The raw
// exponents have room for n4.
__device__ __forceinline__ void stage_tail(const u32 (&codes)[4], const u32 (&exponents)[4], u32 at2, u32 at3, u32 at4,
                                           u8* smem_level2, u8* smem_level3, u8* raw, u32 n4) {
#pragma unroll
  for (u32 k = 0; k < 4; ++k) {
#pragma unroll
    for (u32 shift = 0; shift < 32; shift += 8) {
      // Without a branch: what stays on level 1 goes to this thread's byte behind the stage.
      const bool leaves = (codes[k] >> shift & 3) == 3;
      smem_level2[leaves ? at2 % kStage : kStage + threadIdx.x] = static_cast<u8>(codes[k] >> (shift + 2));
      at2 += leaves;
    }
    // Few get to level 3.
    for (u32 left = codes[k] & codes[k] >> 1 & 0x04040404; left != 0; left &= left - 1) {
      const u32 shift = __ffs(left) - 3, code = codes[k] >> shift;
      smem_level3[at3++ % kStage] = static_cast<u8>(code >> 4);
      if ((code & 63) == 63 && at4 < n4) raw[at4++] = static_cast<u8>(exponents[k] >> shift);
    }
  }
}

// Stores the groups of digits from `begin` to `end`, at most kStepGroups and none from `all` on, to memory of any
// alignment.
__device__ __forceinline__ void store_digits(const u8* smem_digits, u32 begin, u32 end, u8* level, u32 all) {
  end = min(end, all);
  if (begin + threadIdx.x / kWarp * (kWarp / kGroupLanes) >= end) return;  // nothing for this warp
  const u32 quarter = threadIdx.x % kGroupLanes, group = begin + threadIdx.x / kGroupLanes;
  const bool live = group < end;
  uint4 four = make_uint4(0, 0, 0, 0);
  if (live) four = *reinterpret_cast<const uint4*>(smem_digits + (group * kGroup + kQuarter * quarter) % kStage);
  const u32 values[4] = {four.x & 0x03030303, four.y & 0x03030303, four.z & 0x03030303, four.w & 0x03030303};
  const u32 word = pack2(values, quarter);
  if (!live) return;
  u8* const out = level + static_cast<u64>(group) * kDigitBytes + 4 * quarter;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) out[i] = static_cast<u8>(word >> (8 * i));
}

// Zeros up to the next multiple of 64 bytes of a part or plane.
__device__ __forceinline__ void pad_part(u8* part, u64 used) {
  if (threadIdx.x < pad64(used) - used) part[used + threadIdx.x] = 0;
}

// code: as it will be stored. tail_begins: [blocks], in bytes.
extern "C" __global__ void __launch_bounds__(256)
    planes_write(const u8* data, u64 row_bytes, u64 rows, u32 cols, u64 rows_per_table, const u8* code,
                 const u64* tail_begins, u8* digits, u8* sign_mantissa, u8* tails) {
  SHARED(u8, smem_codes, 256);
  SHARED(u8, smem_level2, kStage + kThreads);
  SHARED(u8, smem_level3, kStage);
  SHARED(u64, smem_sums, kWarps);
  const BlockRows block(data, row_bytes, rows, cols, blockIdx.x);
  const u8* const table = code + static_cast<u64>(blockIdx.x) * kBlockRows / rows_per_table * kTableBytes;
  make_codes(table, smem_codes);
  __syncthreads();

  const u64 tables = (rows + rows_per_table - 1) / rows_per_table;
  const u32* const counts =
      reinterpret_cast<const u32*>(code + tables * kTableBytes) + static_cast<u64>(blockIdx.x) * 3;
  // These bound what is written, even if someone changes the data meanwhile.
  const u32 groups2 = counts[0] / kGroup + (counts[0] % kGroup != 0);
  const u32 groups3 = counts[1] / kGroup + (counts[1] % kGroup != 0), all4 = counts[2];
  u8* const level2 = tails + tail_begins[blockIdx.x];
  u8* const level3 = level2 + static_cast<u64>(groups2) * kDigitBytes;
  u8* const raw = level3 + static_cast<u64>(groups3) * kDigitBytes;

  const u64 first_group = static_cast<u64>(blockIdx.x) * groups_in(kBlockRows, cols);
  const u64 last_rows = rows - static_cast<u64>(gridDim.x - 1) * kBlockRows;
  const u64 all_groups =
      static_cast<u64>(gridDim.x - 1) * groups_in(kBlockRows, cols) + groups_in(static_cast<u32>(last_rows), cols);
  u8* const plane1 = sign_mantissa + pad64(all_groups * 8 * kWidth0);
  u8* const plane2 = plane1 + pad64(all_groups * 8 * kWidth1);

  const u32 quarter = threadIdx.x % kGroupLanes, fill = static_cast<u32>(table[0]) << kShift, groups = block.groups();
  u32 n2 = 0, n3 = 0, n4 = 0;  // of the steps before this one
  for (u32 step = 0; step < groups; step += kStepGroups) {
    const u32 group = step + threadIdx.x / kGroupLanes;
    const bool live = group < groups;
    u32 words[kWords], codes[4], digits1[4];
    block.load<false>(group, quarter, fill, words);
    const Quarter values(words);
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      codes[k] = codes_of(values.exponents[k], smem_codes);
      digits1[k] = codes[k] & 0x03030303;
    }
    store_plane<2>(digits, first_group + group, quarter, digits1, live);
    store_plane<kWidth0>(sign_mantissa, first_group + group, quarter, values.plane0, live);
    if constexpr (kWidth1 != 0) store_plane<kWidth1>(plane1, first_group + group, quarter, values.plane1, live);
    if constexpr (kWidth2 != 0) store_plane<kWidth2>(plane2, first_group + group, quarter, values.plane2, live);

    u64 total;
    const u64 before = exclusive_sum(count(codes), smem_sums, total);
    stage_tail(codes, values.exponents, n2 + count2(before), n3 + count3(before), n4 + count4(before), smem_level2,
               smem_level3, raw, all4);
    __syncthreads();
    // The next step writes to the stage behind its own barrier, in exclusive_sum.
    store_digits(smem_level2, n2 / kGroup, (n2 + count2(total)) / kGroup, level2, groups2);
    store_digits(smem_level3, n3 / kGroup, (n3 + count3(total)) / kGroup, level3, groups3);
    n2 += count2(total), n3 += count3(total), n4 += count4(total);
  }

  // The last group of each level, filled up with zeros.
  __syncthreads();
  if (n2 % kGroup + threadIdx.x < kGroup) smem_level2[(n2 + threadIdx.x) % kStage] = 0;
  if (n3 % kGroup + threadIdx.x < kGroup) smem_level3[(n3 + threadIdx.x) % kStage] = 0;
  __syncthreads();
  store_digits(smem_level2, n2 / kGroup, groups2, level2, groups2);
  store_digits(smem_level3, n3 / kGroup, groups3, level3, groups3);

  if (blockIdx.x != gridDim.x - 1) return;
  pad_part(digits, all_groups * kDigitBytes);
  pad_part(sign_mantissa, all_groups * 8 * kWidth0);
  if constexpr (kWidth1 != 0) pad_part(plane1, all_groups * 8 * kWidth1);
  if constexpr (kWidth2 != 0) pad_part(plane2, all_groups * 8 * kWidth2);
  pad_part(tails, static_cast<u64>(raw - tails) + all4);
}
