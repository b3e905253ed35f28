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
// BITFORBIT_TOKENS (8, 16, 32, 64), BITFORBIT_STRIPES, BITFORBIT_WARPS, BITFORBIT_STAGES, BITFORBIT_BLOCKS,
// BITFORBIT_BULK and BITFORBIT_K_STEP (16, 8): see cuda/fused/plan.py; BITFORBIT_WEIGHTS: tiles.cuh.
#include "async.cuh"
#include "fused_splits.cuh"
#include "ldmatrix.cuh"

#ifndef BITFORBIT_K_STEP
#define BITFORBIT_K_STEP 16
#endif

constexpr u32 kTokens = BITFORBIT_TOKENS, kStripes = BITFORBIT_STRIPES, kStages = BITFORBIT_STAGES;
constexpr u32 kWarps = BITFORBIT_WARPS, kThreads = kWarps * kWarp, kTokenTiles = kTokens / kMmaTokens;

// Tiles come by bulk copies of one lane, on architectures that have them, or by copies of 16 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#undef BITFORBIT_BULK
#define BITFORBIT_BULK 0
#endif
constexpr bool kBulk = BITFORBIT_BULK != 0;

// Shared memory, in bytes: two chunks of x; then for each warp the slots of its ring, kStripes decoded tiles, two
// chunks of lists of escapes, and a barrier for each stage.
constexpr u32 kChunkCols = kStages * kTileCols;
constexpr u32 kPitch = kChunkCols + 8;  // of x, in weights: the eight rows of an ldmatrix lie in different banks
constexpr u32 kChunkBytes = 2 * kTokens * kPitch;
constexpr u32 kSlotBytes = kTileBytes, kDecodedBytes = 2 * kTileWeights, kListBytes = 16 * kWarp;
constexpr u32 kRingBytes = kStages * kStripes * kSlotBytes;
constexpr u32 kWarpBytes = kRingBytes + kStripes * (kDecodedBytes + 2 * kListBytes) + 8 * kStages;
static_assert(kStages % 2 == 0, "what a warp has is a multiple of 16 bytes");

// Columns [col, end) of x, of a chunk at most, to shared memory; zeros outside of x.
__device__ __forceinline__ void load_x(const u16* gmem_x, u16* smem_x, u32 tokens, u32 cols, u32 col, u32 end) {
  constexpr u32 kPieces = kChunkCols / 8;  // of 16 bytes, of a token
  constexpr u32 kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0, "a thread has the same columns of all its tokens");
  const u32 first = threadIdx.x / kPieces, piece = 8 * (threadIdx.x % kPieces), at = col + piece;
  if (at >= end || (kStep > kTokens && first >= kTokens)) return;
  static_assert(kStep > kTokens || kTokens % kStep == 0, "all threads that have any have as many tokens");
  u16* smem = smem_x + first * kPitch + piece;
  if (cols % 8 == 0 && reinterpret_cast<u64>(gmem_x) % 16 == 0) {
    const u16* gmem = gmem_x + static_cast<u64>(first) * cols + at;
#pragma unroll
    for (u32 t = 0; t < kTokens; t += kStep) {
      copy_async_or_zeros(smem + t * kPitch, gmem, first + t < tokens && at < cols);
      gmem += static_cast<u64>(kStep) * cols;
    }
  } else {
#pragma unroll 1
    for (u32 t = 0; t < kTokens; t += kStep) {
#pragma unroll 1
      for (u32 i = 0; i < 8; ++i) {
        const bool inside = first + t < tokens && at + i < cols;
        smem[t * kPitch + i] = inside ? __ldg(gmem_x + static_cast<u64>(first + t) * cols + at + i) : u16{0};
      }
    }
  }
}

// Tiles of a warp's stripes, on their way from device memory to a stage of the ring: a phase of its barrier, or a group
// of copies, which the caller commits.
struct Tiles {
  const u8* gmem[kStripes];  // of the next ones: without bulk copies this lane's first 16 bytes

  // copy: the next tile of each stripe. await: waits for a stage, of which other lanes' part is there after a barrier
  // of the warp.
#if BITFORBIT_BULK
  __device__ __forceinline__ void copy(u8* smem_stage, u64* smem_barrier, u32 lane) {
    if (lane == 0) {
      mbarrier_arrive_expect(smem_barrier, kStripes * kTileBytes);
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) copy_bulk(smem_stage + s * kSlotBytes, gmem[s], kTileBytes, smem_barrier);
    }
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) gmem[s] += kTileBytes;
  }

  static __device__ __forceinline__ void await(u64* smem_barrier, u32 phase) { mbarrier_wait(smem_barrier, phase); }
#else
  __device__ __forceinline__ void copy(u8* smem_stage, u64*, u32 lane) {
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
      u8* smem = smem_stage + s * kSlotBytes + 16 * lane;
#pragma unroll
      for (u32 b = 0; b < kTileBytes; b += 16 * kWarp) {
        if (b + 16 * kWarp <= kTileBytes || lane < (kTileBytes - b) / 16) copy_async(smem + b, gmem[s] + b);
      }
      gmem[s] += kTileBytes;
    }
  }

  static __device__ __forceinline__ void await(u64*, u32) { await_copies<kStages - 1>(); }
#endif
};

// A stripe's lists of escapes, a chunk ahead: their beginnings come two chunks before they are used, the entries one.
struct Lists {
  const u32* gmem_offset;     // of the chunk after the next one: this lane's
  RunEscapes now, next;       // lane j: of tile j of the chunk
  u32 now_begin, next_begin;  // entry that is first in shared memory
  u32 after;                  // lane j: entries before tile j of the chunk after the next one; not clamped yet

  // Entries before tile `tile` + lane of the stripe; chunks overlap in one.
  __device__ __forceinline__ u32 load(u32 tile, u32 end, u32 lane) const {
    return __ldg(gmem_offset + min(tile + min(lane, kStages), end));
  }

  // On to the next chunk: its entries, from a multiple of 16 bytes on, as far as there is room. `tile` is the first one
  // of the chunk after it.
  __device__ __forceinline__ void advance(const u8* gmem_escapes, const Header& header, u32 capacity, u8* smem_list,
                                          u32 tile, u32 end, u32 lane) {
    now = next;
    now_begin = next_begin;
    const u32 first = min(after, capacity), following = __shfl_down_sync(kAllLanes, first, 1);
    next = {first, lane < kStages && following > first ? min(following - first, kTileWeights) : 0};
    next_begin = __shfl_sync(kAllLanes, first, 0) & ~(7u >> header.wide);
    const u32 last = __shfl_sync(kAllLanes, first, kStages);
    const u32 entry = next_begin + (8u >> header.wide) * lane;  // the first one of this lane's 16 bytes
    if (entry < last) copy_async(smem_list + 16 * lane, gmem_escapes + (static_cast<u64>(entry) << (1 + header.wide)));
    after = load(tile, end, lane);
  }
};

// Entry first + lane of a chunk, where `first` is that of a tile, for lanes below its number of entries. `begin` is the
// entry that is first in shared memory.
__device__ __forceinline__ u32 list_entry(const u8* smem_list, const u8* gmem_escapes, u32 begin, u32 first,
                                          u32 entries, u32 wide, u32 lane) {
  const u32 at = (first - begin + lane) << (1 + wide);
  const u32 word = *reinterpret_cast<const u32*>(smem_list + min(at & ~3u, kListBytes - 4));
  if (at >= kListBytes && lane < entries) return load_entry(gmem_escapes, first + lane, wide);
  return word >> (8 * (at & 2));  // narrow ones have garbage above [15:0]
}

__device__ __forceinline__ void load_slot(const u8* smem_slot, u32 lane, Lane& share) {
  read_lane(smem_slot + 16 * lane, smem_slot + kTileCodes + kLaneCodeBytes * lane, Resident{}, share);
}

using Sums = float[kStripes * kTokenTiles][4];  // of a lane, as mma has them, stripe after stripe

__device__ __forceinline__ void multiply_step(float (&sum)[4], uint4 a, u32 b0, u32 b1) {
  if constexpr (BITFORBIT_K_STEP == 16) {
    multiply_whole(sum, a, b0, b1);
  } else {
    multiply_half(sum, a.x, a.y, b0);
    multiply_half(sum, a.z, a.w, b1);
  }
}

// The products of kStripes decoded tiles with their 64 columns of x.
__device__ __forceinline__ void multiply(const u16* smem_decoded, const u16* smem_x, u32 lane, Sums& sum) {
  // Lane 8m + r has row (token) r of matrix m: columns 8m to 8m + 7, which are B of two steps.
  const u16* smem_row = smem_x + lane % 8 * kPitch + lane / 8 * 8;
#pragma unroll
  for (u32 i = 0; i < 4; i += 2) {
    uint4 a[kStripes][2];
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
#pragma unroll
      for (u32 j = 0; j < 2; ++j) {
        const u16* smem_a = smem_decoded + s * kTileWeights + 256 * (i + j) + (8 * lane ^ 8 * (i + j));
        a[s][j] = operand(*reinterpret_cast<const uint4*>(smem_a));
      }
    }
#pragma unroll
    for (u32 n = 0; n < kTokenTiles; ++n) {
      const uint4 b = ldmatrix_x4(smem_row + n * kMmaTokens * kPitch + i * kMmaCols);
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        multiply_step(sum[s * kTokenTiles + n], a[s][0], b.x, b.y);
        multiply_step(sum[s * kTokenTiles + n], a[s][1], b.z, b.w);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    fused_linear(const Matrix* gmem_matrices, u32 matrices, const u16* gmem_x, u16* gmem_out, u32 tokens, u32 cols,
                 u32 splits, u32 split_tiles, u32 order_rules, u32* gmem_arrived, float4* gmem_sums) {
  DYNAMIC_SHARED(u8, smem);
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const u32 unit = blockIdx.x / splits, split = blockIdx.x % splits;
  const Rules rules = {order_rules};

  // The matrix of this block's unit, and this warp's first stripe there.
  u32 stripes = 0, first_stripe = unit * kWarps * kStripes;
  const Matrix* gmem_matrix = gmem_matrices;
  for (u32 m = 0;; ++m, ++gmem_matrix) {
    stripes = (gmem_matrix->rows + kTileRows - 1) / kTileRows;
    const u32 units = (stripes - 1) / (kWarps * kStripes) + 1;
    if (first_stripe < units * kWarps * kStripes || m + 1 == matrices) break;
    first_stripe -= units * kWarps * kStripes;
  }
  first_stripe += warp * kStripes;
  const Matrix matrix = *gmem_matrix;

  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 begin = split_begin(tiles_per_stripe, split, splits, split_tiles, rules);
  const u32 end = split_begin(tiles_per_stripe, split + 1, splits, split_tiles, rules);
  u8* smem_ring = smem + 2 * kChunkBytes + warp * kWarpBytes;
  u16* smem_decoded = reinterpret_cast<u16*>(smem_ring + kRingBytes);
  u8* smem_lists = smem_ring + kRingBytes + kStripes * kDecodedBytes;
  u64* smem_barriers = reinterpret_cast<u64*>(smem_lists + 2 * kStripes * kListBytes);

  // As many tiles as the ring has room for, then what takes longer: the first chunk of x and of lists. Without bulk
  // copies each stage is a group of its own, the last one with all the rest, and so is each tile later: there is always
  // the same number of groups behind the one that is waited for. Warps without a stripe of their own take the last one,
  // for nothing.
  Tiles tiles;
  Lists lists[kStripes];
#pragma unroll
  for (u32 s = 0; s < kStripes; ++s) {
    const u64 stripe_tile = static_cast<u64>(min(first_stripe + s, stripes - 1)) * tiles_per_stripe;
    tiles.gmem[s] = matrix.gmem_tiles + (stripe_tile + begin) * kTileBytes + (kBulk ? 0 : 16 * lane);
    lists[s].gmem_offset = matrix.gmem_offsets + stripe_tile;
  }
#if BITFORBIT_BULK
  if (lane < kStages) mbarrier_init(smem_barriers + lane, 1);
  mbarrier_fence();
  __syncwarp();
#endif
#pragma unroll
  for (u32 j = 0; j < kStages; ++j) {
    if (begin + j < end) tiles.copy(smem_ring + j * kStripes * kSlotBytes, smem_barriers + j, lane);
    if (!kBulk && j + 1 < kStages) commit_copies();
  }
  const Header header = load_header(matrix.gmem_header, lane);
  const u32 capacity = entry_capacity(matrix.escapes_bytes, header.wide);
#pragma unroll
  for (u32 s = 0; s < kStripes; ++s) lists[s].after = lists[s].load(begin, end, lane);
  load_x(gmem_x, reinterpret_cast<u16*>(smem), tokens, cols, begin * kTileCols, end * kTileCols);
#pragma unroll
  for (u32 s = 0; s < kStripes; ++s) {
    lists[s].advance(matrix.gmem_escapes, header, capacity, smem_lists + s * kListBytes, begin + kStages, end, lane);
  }
  commit_copies();
  await_copies<0>();

  Sums sum = {};
  u32 chunk = 0;
  for (u32 chunk_begin = begin; chunk_begin < end; chunk_begin += kStages, chunk ^= 1) {
    await_copies<kBulk ? 0 : kStages - 1>();
    __syncthreads();  // all threads' parts of this chunk of x are there; all have done with the one before
    const u32 next_chunk = chunk_begin + kStages, chunk_end = min(next_chunk, end);
    const u8* smem_list = smem_lists + chunk * kStripes * kListBytes;
    const u16* smem_x = reinterpret_cast<const u16*>(smem + chunk * kChunkBytes);
    if (next_chunk < end) {
      load_x(gmem_x, reinterpret_cast<u16*>(smem + (chunk ^ 1) * kChunkBytes), tokens, cols, next_chunk * kTileCols,
             end * kTileCols);
    }
#pragma unroll
    for (u32 s = 0; s < kStripes; ++s) {
      lists[s].advance(matrix.gmem_escapes, header, capacity, smem_lists + ((chunk ^ 1) * kStripes + s) * kListBytes,
                       next_chunk + kStages, end, lane);
    }
    if (kBulk) commit_copies();

    u8* smem_slot = smem_ring;
    for (u32 tile = chunk_begin; tile < chunk_end; ++tile) {
      u64* smem_barrier = smem_barriers + (tile - chunk_begin);
      Tiles::await(smem_barrier, chunk);
      __syncwarp();
      u32 first[kStripes], entries[kStripes], entry[kStripes];
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        Lane share;
        u32 pair[kPairs];
        load_slot(smem_slot + s * kSlotBytes, lane, share);
        const int j = static_cast<int>(tile - chunk_begin);
        first[s] = __shfl_sync(kAllLanes, lists[s].now.first, j);
        entries[s] = __shfl_sync(kAllLanes, lists[s].now.count, j);
        entry[s] = list_entry(smem_list + s * kListBytes, matrix.gmem_escapes, lists[s].now_begin, first[s], entries[s],
                              header.wide, lane);
        decode_lane(share, header.base, pair);
        stage(pair, smem_decoded + s * kTileWeights, lane);
      }
      __syncwarp();  // the slots are read, the tiles written
      if (tile + kStages < end) tiles.copy(smem_slot, smem_barrier, lane);
      if (!kBulk) commit_copies();
#pragma unroll
      for (u32 s = 0; s < kStripes; ++s) {
        patch(smem_decoded + s * kTileWeights, lane, matrix.gmem_escapes, entry[s], first[s], entries[s], header);
      }
      __syncwarp();
      multiply(smem_decoded, smem_x, lane, sum);
      smem_slot += kStripes * kSlotBytes;
      smem_x += kTileCols;
    }
  }

  if (splits > 1 && !add_splits<kThreads>(sum, gmem_sums, gmem_arrived + unit, unit, split, splits, rules, smem)) {
    return;
  }
#pragma unroll
  for (u32 s = 0; s < kStripes; ++s) {
    const Bias bias = load_bias(matrix, first_stripe + s, lane);
#pragma unroll
    for (u32 n = 0; n < kTokenTiles; ++n) {
      store_sums(sum[s * kTokenTiles + n], bias, gmem_out + matrix.rows_before * tokens, first_stripe + s, matrix.rows,
                 n * kMmaTokens, tokens, lane, rules);
    }
  }
}
