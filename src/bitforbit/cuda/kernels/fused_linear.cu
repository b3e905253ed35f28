// y [tokens, rows] = x [tokens, cols] * W [rows, cols]^T + bias, for several W with the same x, straight from tiles.
//
// A block has kWarps * kStripes stripes of 16 rows (a unit) and a range of columns (a split). Its warps share x, which
// comes in chunks of kStages tiles' columns; each streams its own tiles through a ring in shared memory that no other
// warp touches. For a tile: decode it into registers; put them to shared memory, where its escapes are patched; take
// them back as fragment A of the products, for kTokens tokens. Sums of the splits of a unit meet in device memory; the
// block that comes last adds them up, in the order of splits whoever that is.
//
// Safe for any content of the parts: what comes from memory is clamped before it becomes an address or a count.
//
// BITFORBIT_TOKENS (8, 16, 32, 64), BITFORBIT_STRIPES, BITFORBIT_WARPS, BITFORBIT_STAGES: see cuda/fused/plan.py.
#include "async.cuh"
#include "fused.cuh"
#include "ldmatrix.cuh"

constexpr u32 kTokens = BITFORBIT_TOKENS, kStripes = BITFORBIT_STRIPES, kStages = BITFORBIT_STAGES;
constexpr u32 kWarps = BITFORBIT_WARPS, kThreads = kWarps * kWarp, kTokenTiles = kTokens / kMmaTokens;

// Shared memory, in bytes: two chunks of x; then for each warp its ring, kStripes decoded tiles, kStages * kStripes
// times first entry and number of entries.
constexpr u32 kChunkCols = kStages * kTileCols;
constexpr u32 kPitch = kChunkCols + 8;  // of x, in weights: the eight rows of an ldmatrix lie in different banks
constexpr u32 kChunkBytes = 2 * kTokens * kPitch;
constexpr u32 kSlotEscapes = 128;  // the list's first bytes, from a multiple of 16 on
constexpr u32 kSlotBytes = kTileBytes + kSlotEscapes;
constexpr u32 kDecodedBytes = 2 * kTileWeights;
constexpr u32 kRingBytes = kStages * kStripes * kSlotBytes;
constexpr u32 kWarpBytes = kRingBytes + kStripes * kDecodedBytes + kStages * kStripes * 8;
static_assert(kWarpBytes % 16 == 0 && kSlotBytes == 96 * 16, "copies are of 16 bytes, three for a lane and tile");

// Columns [col, end) of x, of a chunk at most, to shared memory; zeros outside of x.
__device__ __forceinline__ void load_x(const u16* gmem_x, u16* smem_x, u32 tokens, u32 cols, u32 col, u32 end,
                                       bool aligned) {
  constexpr u32 kRowPieces = kChunkCols / 8;
#pragma unroll
  for (u32 p = threadIdx.x; p < kTokens * kRowPieces; p += kThreads) {
    const u32 token = p / kRowPieces, at = col + p % kRowPieces * 8;
    u16* smem = smem_x + token * kPitch + p % kRowPieces * 8;
    const u64 index = static_cast<u64>(token) * cols + at;
    if (at >= end) continue;
    if (aligned) {
      const bool inside = token < tokens && at < cols;
      copy_async_or_zeros(smem, gmem_x + (inside ? index : 0), inside);
    } else {
      for (u32 i = 0; i < 8; ++i) smem[i] = token < tokens && at + i < cols ? __ldg(gmem_x + index + i) : u16{0};
    }
  }
}

// Tiles side by side of one stripe, on their way from device memory to slots.
struct Stream {
  const u8* gmem_tile;     // of the next one: this lane's first 16 bytes
  const u32* gmem_offset;  // that of the second tile after it
  u32 first, next;         // entries before it, and before the tile after it; not clamped yet

  __device__ __forceinline__ void open(const Matrix& matrix, u64 tile, u32 lane) {
    gmem_tile = matrix.gmem_tiles + tile * kTileBytes + 16 * lane;
    gmem_offset = matrix.gmem_offsets + tile + 2;
    first = __ldg(gmem_offset - 2);
    next = __ldg(gmem_offset - 1);
  }

  // The next tile and the first bytes of its list, to a slot; `last` if there is none after it.
  __device__ __forceinline__ void copy(const Matrix& matrix, u32 wide, u32 capacity, u8* smem_slot, uint2* smem_entries,
                                       bool last, u32 lane) {
    const u32 begin = min(first, capacity), end = min(next, capacity);
    const u32 entries = end > begin ? min(end - begin, kTileWeights) : 0;
    const u64 at = static_cast<u64>(begin) << (1 + wide);
    const u32 bytes = (static_cast<u32>(at) & 15) + (entries << (1 + wide)), piece = 16 * (lane - 24);
    copy_async(smem_slot + 16 * lane, gmem_tile);
    copy_async(smem_slot + 512 + 16 * lane, gmem_tile + 512);
    const u8* gmem_third = lane < 24 ? gmem_tile + 1024 : matrix.gmem_escapes + (at & ~u64{15}) + piece;
    if (lane < 24 || piece < bytes) copy_async(smem_slot + 1024 + 16 * lane, gmem_third);
    if (lane == 0) *smem_entries = make_uint2(begin, entries);
    if (last) return;
    gmem_tile += kTileBytes;
    first = next;
    next = __ldg(gmem_offset++);
  }
};

// Entry `lane` of a tile's list. Those that do not lie in the slot are of long lists of wide entries.
__device__ __forceinline__ u32 slot_entry(const u8* smem_slot, const u8* gmem_escapes, uint2 entries, u32 wide,
                                          u32 lane) {
  if (lane >= entries.y) return 0;
  const u32 at = (entries.x << (1 + wide) & 15) + (lane << (1 + wide));
  if (at >= kSlotEscapes) return load_entry(gmem_escapes, entries.x + lane, wide);
  const u8* smem = smem_slot + kTileBytes + at;
  return wide ? *reinterpret_cast<const u32*>(smem) : *reinterpret_cast<const u16*>(smem);
}

__device__ __forceinline__ void load_slot(const u8* smem_slot, u32 lane, u32 (&word)[8], u32 (&code)[3]) {
  const uint4 low = reinterpret_cast<const uint4*>(smem_slot)[lane];
  const uint4 high = reinterpret_cast<const uint4*>(smem_slot)[32 + lane];
  word[0] = low.x, word[1] = low.y, word[2] = low.z, word[3] = low.w;
  word[4] = high.x, word[5] = high.y, word[6] = high.z, word[7] = high.w;
#pragma unroll
  for (u32 w = 0; w < 3; ++w) code[w] = reinterpret_cast<const u32*>(smem_slot + kTileCodes)[32 * w + lane];
}

// The products of kStripes decoded tiles with their 64 columns of x.
__device__ __forceinline__ void multiply(const u16* smem_decoded, const u16* smem_x, u32 lane,
                                         float (&sum)[kStripes][kTokenTiles][4]) {
  // Lane 8m + r has row (token) r of matrix m: columns 8m to 8m + 7, which are B of two steps.
  const u16* smem_row = smem_x + lane % 8 * kPitch + lane / 8 * 8;
#pragma unroll
  for (u32 i = 0; i < 4; i += 2) {
    uint4 a[kStripes][2];
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        a[s][j] =
            *reinterpret_cast<const uint4*>(smem_decoded + s * kTileWeights + 256 * (i + j) + (8 * lane ^ 8 * (i + j)));
      }
    }
#pragma unroll
    for (u32 n = 0; n < kTokenTiles; ++n) {
      const uint4 b = ldmatrix_x4(smem_row + n * kMmaTokens * kPitch + i * kMmaCols);
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        mma_bf16(sum[s][n], a[s][0], b.x, b.y);
        mma_bf16(sum[s][n], a[s][1], b.z, b.w);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    fused_linear(const Matrix* gmem_matrices, u32 matrices, const u16* gmem_x, u16* gmem_out, u32 tokens, u32 cols,
                 u32 splits, u32* gmem_arrived, float4* gmem_sums) {
  DYNAMIC_SHARED(u8, smem);
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const u32 unit = blockIdx.x / splits, split = blockIdx.x % splits;

  // The matrix of this block's unit, and the number of the unit there.
  u32 stripes = 0, first_stripe = unit * kWarps * kStripes;
  const Matrix* gmem_matrix = gmem_matrices;
  for (u32 m = 0;; ++m, ++gmem_matrix) {
    stripes = static_cast<u32>((gmem_matrix->rows + kTileRows - 1) / kTileRows);
    const u32 units = (stripes - 1) / (kWarps * kStripes) + 1;
    if (first_stripe < units * kWarps * kStripes || m + 1 == matrices) break;
    first_stripe -= units * kWarps * kStripes;
  }
  first_stripe += warp * kStripes;
  const Matrix matrix = *gmem_matrix;
  const bool active = first_stripe < stripes;

  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 begin = split_begin(tiles_per_stripe, split, splits),
            end = split_begin(tiles_per_stripe, split + 1, splits);
  const bool aligned = cols % 8 == 0 && reinterpret_cast<u64>(gmem_x) % 16 == 0;
  u8* smem_ring = smem + 2 * kChunkBytes + warp * kWarpBytes;
  u16* smem_decoded = reinterpret_cast<u16*>(smem_ring + kRingBytes);
  uint2* smem_entries = reinterpret_cast<uint2*>(smem_ring + kRingBytes + kStripes * kDecodedBytes);

  load_x(gmem_x, reinterpret_cast<u16*>(smem), tokens, cols, begin * kTileCols, end * kTileCols, aligned);
  const Header header = load_header(matrix.gmem_header, lane);
  const u32 capacity = entry_capacity(matrix.escapes_bytes, header.wide);
  Stream stream[kStripes];
  if (active) {
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
      stream[s].open(matrix, static_cast<u64>(min(first_stripe + s, stripes - 1)) * tiles_per_stripe + begin, lane);
    }
  }
  for (u32 j = 0; j < kStages; ++j) {  // a group each, so that all tiles' groups have the same distance
    if (active && begin + j < end) {
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        const u32 slot = j * kStripes + s;
        stream[s].copy(matrix, header.wide, capacity, smem_ring + slot * kSlotBytes, smem_entries + slot,
                       begin + j + 1 == end, lane);
      }
    }
    commit_copies();
  }

  float sum[kStripes][kTokenTiles][4] = {};
  u32 slot = 0, chunk = 0;
  for (u32 tile = begin; tile < end; ++tile) {
    await_copies<kStages - 1>();
    if (slot == 0) {
      __syncthreads();  // all warps' parts of this chunk are there; all have done with the one before
      const u32 after = tile + kStages;
      if (after < end) {
        load_x(gmem_x, reinterpret_cast<u16*>(smem + (chunk ^ 1) * kChunkBytes), tokens, cols, after * kTileCols,
               end * kTileCols, aligned);
      }
    } else {
      __syncwarp();
    }
    if (active) {
      const u16* smem_x = reinterpret_cast<const u16*>(smem + chunk * kChunkBytes) + slot * kTileCols;
      u8* smem_slot = smem_ring + slot * kStripes * kSlotBytes;
      uint2 entries[kStripes];
      u32 entry[kStripes];
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        u32 word[8], code[3], pair[kPairs];
        load_slot(smem_slot + s * kSlotBytes, lane, word, code);
        entries[s] = smem_entries[slot * kStripes + s];
        entry[s] = slot_entry(smem_slot + s * kSlotBytes, matrix.gmem_escapes, entries[s], header.wide, lane);
        decode_lane(word, code, header.base_pair, pair);
        stage(pair, smem_decoded + s * kTileWeights, lane);
      }
      __syncwarp();  // the slots are read, the tiles written
      const u32 after = tile + kStages;
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        if (after < end) {
          stream[s].copy(matrix, header.wide, capacity, smem_slot + s * kSlotBytes, smem_entries + slot * kStripes + s,
                         after + 1 == end, lane);
        }
        patch(smem_decoded + s * kTileWeights, lane, matrix.gmem_escapes, entry[s], entries[s].x, entries[s].y, header);
      }
      __syncwarp();
      multiply(smem_decoded, smem_x, lane, sum);
    }
    commit_copies();
    slot = slot + 1 == kStages ? 0 : slot + 1;
    chunk ^= slot == 0 ? 1 : 0;
  }

  if (splits > 1) {
    constexpr u32 kBlockSums = kWarps * kStripes * kTokenTiles * kWarp;
    float4* gmem_mine = gmem_sums + warp * kStripes * kTokenTiles * kWarp + lane;
    if (active) {
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
#pragma unroll
        for (u32 n = 0; n < kTokenTiles; ++n) {
          const float (&four)[4] = sum[s][n];
          __stcg(gmem_mine + static_cast<u64>(blockIdx.x) * kBlockSums + (s * kTokenTiles + n) * kWarp,
                 make_float4(four[0], four[1], four[2], four[3]));
        }
      }
    }
    __threadfence();
    __syncthreads();
    u32* smem_last = reinterpret_cast<u32*>(smem);
    if (threadIdx.x == 0) *smem_last = atomicAdd(gmem_arrived + unit, 1) == splits - 1 ? 1 : 0;
    __syncthreads();
    if (*smem_last == 0) return;
    if (threadIdx.x == 0) gmem_arrived[unit] = 0;  // for the next launch
    __threadfence();
    if (!active) return;
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
#pragma unroll
      for (u32 n = 0; n < kTokenTiles; ++n) {
        const float4* gmem = gmem_mine + static_cast<u64>(unit) * splits * kBlockSums + (s * kTokenTiles + n) * kWarp;
        float4 total = __ldcg(gmem);
        for (u32 i = 1; i < splits; ++i) {
          const float4 next = __ldcg(gmem + static_cast<u64>(i) * kBlockSums);
          total = make_float4(total.x + next.x, total.y + next.y, total.z + next.z, total.w + next.w);
        }
        sum[s][n][0] = total.x, sum[s][n][1] = total.y, sum[s][n][2] = total.z, sum[s][n][3] = total.w;
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (u32 s = 0; s < kStripes; ++s) {
#pragma unroll
    for (u32 n = 0; n < kTokenTiles; ++n) {
      store_sums(sum[s][n], matrix.gmem_bias, gmem_out + matrix.rows_before * tokens, first_stripe + s,
                 static_cast<u32>(matrix.rows), n * kMmaTokens, tokens, lane);
    }
  }
}
