// Rows of plain weights to tiles, in four steps between which the host chooses the window: how often each exponent
// occurs; the escapes of each tile; their running sum (tiles_scan.cu); tiles and escapes. A warp per tile, which reads
// its weights as they lie in the registers of the matrix instruction.
#include "tiles.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;
constexpr u32 kExponents = 256;
constexpr u32 kWindow = 8;

constexpr u32 kVector = 16 / sizeof(Element);  // weights in 16 bytes

__device__ __forceinline__ u32 exponent_of(u32 weight) { return (weight & kExponentBits) >> kExponentShift; }

// gmem_bins[e] += number of weights with exponent e. Each warp counts for itself in shared memory.
extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_histogram(const Element* gmem_weights, u64 count, u64* gmem_bins) {
  SHARED(u32, smem_bins, kWarps * kExponents);
  for (u32 i = threadIdx.x; i < kWarps * kExponents; i += kThreads) smem_bins[i] = 0;
  __syncthreads();
  u32* smem_own = smem_bins + threadIdx.x / kWarp * kExponents;
  const u64 thread = static_cast<u64>(blockIdx.x) * kThreads + threadIdx.x;
  const u64 threads = static_cast<u64>(gridDim.x) * kThreads;
  // Some weights before the first 16-byte boundary, whole vectors, some after them.
  const u64 head = min(count, (16 - reinterpret_cast<u64>(gmem_weights) % 16) / sizeof(Element) % kVector);
  const u64 groups = (count - head) / kVector, tail = head + kVector * groups;
  for (u64 i = thread; i < groups; i += threads) {
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(gmem_weights + head) + i);
    const u32 word[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (u32 j = 0; j < kVector; ++j) {
      const u32 element = word[j / (kVector / 4)] >> 8 * sizeof(Element) * (j % (kVector / 4));
      atomicAdd(smem_own + exponent_of(from_element(static_cast<Element>(element))), 1u);
    }
  }
  if (thread < head) atomicAdd(smem_own + exponent_of(from_element(gmem_weights[thread])), 1u);
  if (thread < count - tail) atomicAdd(smem_own + exponent_of(from_element(gmem_weights[tail + thread])), 1u);
  __syncthreads();
  for (u32 e = threadIdx.x; e < kExponents; e += kThreads) {
    u64 sum = 0;
    for (u32 w = 0; w < kWarps; ++w) sum += smem_bins[w * kExponents + e];
    if (sum != 0) atomicAdd(gmem_bins + e, sum);
  }
}

// Where a lane's weights of a tile begin: row and column of step 0, register 0, half 0.
struct Corner {
  u64 row;
  u32 col;
};

__device__ __forceinline__ Corner corner_of(u32 tile, u32 cols, u32 lane) {
  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  return {static_cast<u64>(tile / tiles_per_stripe) * kTileRows + lane / 4,
          tile % tiles_per_stripe * kTileCols + 2 * (lane % 4)};
}

// A lane's 32 weights of a tile, in the order of the matrix instruction. What is outside of the matrix has the window's
// first exponent and no other bit.
__device__ __forceinline__ void gather_pairs(const Element* gmem_weights, u32 rows, u32 cols, Corner corner, u32 base,
                                             u32 (&pair)[kPairs]) {
#pragma unroll
  for (u32 p = 0; p < kPairs; ++p) {
    const u64 row = corner.row + 8 * (p % 2);
    const u32 col = corner.col + 8 * (p / 2);  // 16 * step + 8 * (register div 2)
    const Element* gmem = gmem_weights + row * cols + col;
    pair[p] = base * kExponentPair;
    if (row >= rows || col >= cols) continue;
    if (sizeof(Element) == 2 && col + 1 < cols && reinterpret_cast<u64>(gmem) % 4 == 0) {
      pair[p] = __ldg(reinterpret_cast<const u32*>(gmem));
    } else {
      const u32 high = col + 1 < cols ? from_element(__ldg(gmem + 1)) : base << kExponentShift;
      pair[p] = from_element(__ldg(gmem)) | high << 16;
    }
  }
}

__device__ __forceinline__ bool escapes(u32 weight, u32 base) { return exponent_of(weight) - base >= kWindow; }

// gmem_counts[t] = number of escapes of tile t.
extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_count(const Element* gmem_weights, u32 rows, u32 cols, u32 tiles, u32 base, u32* gmem_counts) {
  const u32 lane = threadIdx.x % kWarp, tile = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (tile >= tiles) return;
  u32 pair[kPairs], count = 0;
  gather_pairs(gmem_weights, rows, cols, corner_of(tile, cols, lane), base, pair);
#pragma unroll
  for (u32 p = 0; p < kPairs; ++p) count += escapes(pair[p], base) + escapes(pair[p] >> 16, base);
#pragma unroll
  for (u32 step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(kAllLanes, count, static_cast<int>(step));
  if (lane == 0) gmem_counts[tile] = count;
}

// Writes tiles, and the entries of their escapes from gmem_offsets[tile] on. Six blocks at a time for BF16: for sm_80,
// ptxas would spill a register to have eight; other kinds need more registers. gmem_ranks[e]: index of an escaped
// exponent in the header, for entries of 2 bytes.
extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_WEIGHTS == 0 ? 6 : 4)
    tiles_write(const Element* gmem_weights, u32 rows, u32 cols, u32 tiles, u32 base, const u8* gmem_ranks,
                u32 entry_bytes, const u32* gmem_offsets, u8* gmem_tiles, u8* gmem_escapes, u32 entries) {
  const u32 lane = threadIdx.x % kWarp, tile = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (tile >= tiles) return;
  const Corner corner = corner_of(tile, cols, lane);
  u32 pair[kPairs];
  gather_pairs(gmem_weights, rows, cols, corner, base, pair);

  Lane share = {};
  u32 escaped = 0;  // [2p + h]: half h of pair p, which is the order of positions within a step
#pragma unroll
  for (u32 p = 0; p < kPairs; ++p) {
    u32 codes = 0;  // [2:0] low half, [18:16] high half
#pragma unroll
    for (u32 h = 0; h < 2; ++h) {
      const u32 weight = pair[p] >> 16 * h;
      if (escapes(weight, base)) {
        escaped |= 1u << (2 * p + h);
      } else {
        codes |= (exponent_of(weight) - base) << 16 * h;
      }
    }
    encode_pair(share, p, pair[p] & kSignMantissaPair, codes);
  }
  u8* gmem_tile = gmem_tiles + static_cast<u64>(tile) * kTileBytes;
  write_lane(gmem_tile + 16 * lane, gmem_tile + kTileCodes + kLaneCodeBytes * lane, share);

  // Escapes of steps 0-3 at [15:0], [31:16], [47:32], [63:48], at most 256 each: of this lane, then of it and all
  // before.
  u64 own = 0;
#pragma unroll
  for (u32 i = 0; i < 4; ++i) own |= static_cast<u64>(__popc(escaped >> 8 * i & 0xFF)) << 16 * i;
  u64 before = own;
#pragma unroll
  for (u32 distance = 1; distance < kWarp; distance *= 2) {
    const u64 other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += other;
  }
  const u64 total = __shfl_sync(kAllLanes, before, kWarp - 1);
  before -= own;
  u32 step_begin = gmem_offsets[tile];
#pragma unroll 1
  for (u32 i = 0; i < 4; ++i) {
    u32 at = step_begin + (static_cast<u32>(before >> 16 * i) & 0xFFFF);
    for (u32 left = escaped >> 8 * i & 0xFF; left != 0 && at < entries; left &= left - 1) {
      const u32 j = static_cast<u32>(__ffs(static_cast<i32>(left))) - 1;  // [2:1] register, [0] half
      const u64 row = corner.row + 8 * (j >> 1 & 1);
      const u32 col = corner.col + 16 * i + 8 * (j >> 2) + (j & 1);
      const u32 position = 256 * i + 8 * lane + j,
                exponent = exponent_of(from_element(__ldg(gmem_weights + row * cols + col)));
      if (entry_bytes == kWideBytes) {
        reinterpret_cast<u32*>(gmem_escapes)[at] = position | exponent << 16;
      } else {
        reinterpret_cast<u16*>(gmem_escapes)[at] = static_cast<u16>(position | __ldg(gmem_ranks + exponent) << 10);
      }
      ++at;
    }
    step_begin += static_cast<u32>(total >> 16 * i) & 0xFFFF;
  }
}
