// The product of fused_linear.cu (same parameters, same parts, same order of summation) by the instructions of one
// architecture, sm_90a: the tensor cores take the weights from the registers of four warps, 64 rows at once, and x from
// shared memory by themselves, while the warps decode the next tile.
//
// A block has kWarps stripes of 16 rows (a unit) and a range of columns (a split). Its warps share x, which comes in
// chunks of kStages tiles' columns; each streams its own tiles through a ring in shared memory by bulk copies. For a
// tile: decode it into registers; put them to shared memory, where its escapes are patched; wait for the products of
// the tile before; take the weights back as fragment a; issue the products. Sums of the splits of a unit meet in device
// memory; the block that comes last adds them up, in the order of splits whoever that is.
//
// Safe for any content of the parts: what comes from memory is clamped before it becomes an address or a count.
//
// BITFORBIT_TOKENS (8, 16, 32, 64), BITFORBIT_WARPS, BITFORBIT_STAGES and BITFORBIT_BLOCKS: see cuda/fused/plan.py.
#include "fused.cuh"
#include "wgmma.cuh"

constexpr u32 kTokens = BITFORBIT_TOKENS, kTokenTiles = kTokens / kMmaTokens, kStages = BITFORBIT_STAGES;
constexpr u32 kWarps = BITFORBIT_WARPS, kThreads = kWarps * kWarp;
static_assert(kWarps % 4 == 0, "whole warpgroups");

#if defined(BITFORBIT_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Shared memory, in bytes, on kSwizzleBytes: two chunks of x, for each tile a swizzled matrix [kTokens, 64]; the table
// of escapes' exponents; then for each warp the steps of its ring, a decoded tile, and two chunks of lists of escapes.
// A step has two tiles, which come together, and behind them their barrier and, for two chunks, their runs of escapes.
constexpr u32 kTileXBytes = 2 * kTokens * kTileCols, kChunkBytes = kStages * kTileXBytes;
constexpr u32 kTableBytes = 128, kDecodedBytes = 2 * kTileWeights, kListBytes = 16 * kWarp,
              kListEntries = kListBytes / 2;
constexpr u32 kStepTiles = 2, kSteps = kStages / kStepTiles;
constexpr u32 kBarrier = kStepTiles * kTileBytes, kRuns = kBarrier + 16, kRunBytes = 8;
constexpr u32 kStepBytes = kRuns + 2 * kStepTiles * kRunBytes, kRingBytes = kSteps * kStepBytes;
constexpr u32 kWarpBytes = kRingBytes + kDecodedBytes + 2 * kListBytes;
static_assert(kStages % kStepTiles == 0, "whole steps");

__device__ __forceinline__ u64* barrier_of(u8* smem_step) { return reinterpret_cast<u64*>(smem_step + kBarrier); }

// Columns [col, end) of x, of a chunk at most, to shared memory; zeros for columns outside of x. Tokens that are not
// there may be garbage: no other token's sums depend on them.
struct Activations {
  const u16* gmem;  // of this thread's first token, at its piece of a chunk that begins at column 0
  u8* smem;         // of this thread's first token and piece, in the first chunk
  u32 token, piece;

  static constexpr u32 kPieces = 8 * kStages;               // of 16 bytes, of a token
  static constexpr u32 kTokensAtOnce = kThreads / kPieces;  // each by another thread
  static_assert(kThreads % (8 * kPieces) == 0 || kStages == 2, "tokens of a thread are swizzled alike");

  __device__ __forceinline__ Activations(const u16* gmem_x, u8* smem_x, u32 cols)
      : token(threadIdx.x / kPieces), piece(threadIdx.x % kPieces) {
    gmem = gmem_x + static_cast<u64>(token) * cols + 8 * piece;
    smem = smem_x + piece / 8 * kTileXBytes + swizzled(token, piece % 8);
  }

  __device__ __forceinline__ void load(u32 chunk, u32 tokens, u32 cols, u32 col, u32 end, bool aligned) const {
    const u32 at = col + 8 * piece;
    if (at >= end) return;
    u8* smem_to = smem + chunk * kChunkBytes;
    const u16* gmem_from = gmem + col;
    const u64 further = static_cast<u64>(kTokensAtOnce) * cols;
    if (aligned) {
#pragma unroll
      for (u32 i = 0; i < (kTokens + kTokensAtOnce - 1) / kTokensAtOnce; ++i) {
        if (token + i * kTokensAtOnce < tokens) copy_async_or_zeros(smem_to, gmem_from, at < cols);
        smem_to += 128 * kTokensAtOnce;
        gmem_from += further;
      }
    } else {
#pragma unroll 1
      for (u32 t = token; t < tokens; t += kTokensAtOnce) {
#pragma unroll 1
        for (u32 i = 0; i < 8; ++i) {
          reinterpret_cast<u16*>(smem_to)[i] = at + i < cols ? __ldg(gmem_from + i) : u16{0};
        }
        smem_to += 128 * kTokensAtOnce;
        gmem_from += further;
      }
    }
  }
};

// A stripe's lists of escapes, a chunk ahead: their beginnings come two chunks before they are used, the entries one.
// A tile's run in shared memory has the byte at which its first entry is in the list there, and their number, at most
// kWarp; or, where that will not do, its first entry in device memory, and their number + kElsewhere.
constexpr u32 kElsewhere = 1 << 16;
struct Lists {
  const u32* gmem_offset;  // of the stripe's first tile
  u32 after;               // lane j: entries before tile j of the chunk after the next one; not clamped yet

  // Entries before tile `tile` + lane of the stripe; chunks overlap in one.
  __device__ __forceinline__ u32 load(u32 tile, u32 end, u32 lane) const {
    return __ldg(gmem_offset + min(tile + min(lane, kStages), end));
  }

  // On to the next chunk: its entries, from a multiple of 16 bytes on, as far as there is room. `tile` is the first one
  // of the chunk after it.
  __device__ __forceinline__ void advance(const u8* gmem_escapes, u32 wide, u32 capacity, u8* smem_list, u8* smem_runs,
                                          u32 tile, u32 end, u32 lane) {
    const u32 first = min(after, capacity), following = __shfl_down_sync(kAllLanes, first, 1);
    const u32 entries = following > first ? min(following - first, kTileWeights) : 0;
    const u32 begin = __shfl_sync(kAllLanes, first, 0) & ~7u, last = __shfl_sync(kAllLanes, first, kStages);
    const u32 entry = begin + 8 * lane;  // the first one of this lane's 16 bytes
    if (wide == 0 && entry < last) copy_async(smem_list + 16 * lane, gmem_escapes + 2 * static_cast<u64>(entry));
    const u32 place = first - begin;
    const bool here = wide == 0 && entries <= kWarp && place <= kListEntries - kWarp;
    if (lane < kStages) {
      *reinterpret_cast<uint2*>(smem_runs + lane / kStepTiles * kStepBytes + lane % kStepTiles * kRunBytes) =
          here ? make_uint2(2 * place, entries) : make_uint2(first, entries + kElsewhere);
    }
    after = load(tile, end, lane);
  }
};

// A tile's weights in shared memory are in the order of their positions: a lane's fragment of a product is 16 bytes.
__device__ __forceinline__ uint4* fragment(u16* smem_decoded, u32 i, u32 lane) {
  return reinterpret_cast<uint4*>(smem_decoded + 256 * i + 8 * lane);
}

// Decodes a tile into shared memory; escapes are still missing.
__device__ __forceinline__ void decode(const u8* smem_tile, u16* smem_decoded, u32 base_pair, u32 lane) {
  const uint4 low = reinterpret_cast<const uint4*>(smem_tile)[lane];
  const uint4 high = reinterpret_cast<const uint4*>(smem_tile)[32 + lane];
  const u32 word[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
  u32 code[3], pair[kPairs];
#pragma unroll
  for (u32 w = 0; w < 3; ++w) code[w] = reinterpret_cast<const u32*>(smem_tile + kTileCodes)[32 * w + lane];
  decode_lane(word, code, base_pair, pair);
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    *fragment(smem_decoded, i, lane) = make_uint4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
  }
}

// Puts the exponents of a tile's escapes in place. smem_list: the list of its chunk, from entry `lane` on.
__device__ __forceinline__ void patch_run(u16* smem_decoded, const u16* smem_table, const u8* smem_list,
                                          const u8* gmem_escapes, u32 wide, uint2 run, u32 lane) {
  if (run.y <= kWarp) {
    if (lane < run.y) {
      const u32 entry = *reinterpret_cast<const u16*>(smem_list + run.x);
      u16* weight = smem_decoded + (entry & (kTileWeights - 1));  // [9:0] position, [15:10] index
      *weight = static_cast<u16>((*weight & ~kExponentBits) | smem_table[entry >> 10]);
    }
  } else {
#pragma unroll 1
    for (u32 i = lane; i < run.y - kElsewhere; i += kWarp) {
      const u32 entry = load_entry(gmem_escapes, run.x + i, wide);
      u16* weight = smem_decoded + (entry & (kTileWeights - 1));
      const u32 exponent = wide ? (entry >> 16 & 0xFF) << 7 : smem_table[entry >> 10];  // [23:16] of a wide one
      *weight = static_cast<u16>((*weight & ~kExponentBits) | exponent);
    }
  }
}

using Sums = float[kTokenTiles][4];  // of a lane, as the products have them

// Puts this block's sums to device memory. The block of the unit that comes last takes those of all splits back and
// adds them in ascending order; for the others the answer is false.
__device__ __forceinline__ bool add_splits(Sums& sum, float4* gmem_sums, u32* gmem_arrived, u32 unit, u32 split,
                                           u32 splits, u8* smem) {
  constexpr u32 kBlockSums = kTokenTiles * kThreads;
  float4* gmem_unit = gmem_sums + static_cast<u64>(unit) * splits * kBlockSums + threadIdx.x;
#pragma unroll
  for (u32 n = 0; n < kTokenTiles; ++n) {
    __stcg(gmem_unit + static_cast<u64>(split) * kBlockSums + n * kThreads,
           make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]));
  }
  __threadfence();
  __syncthreads();
  u32* smem_last = reinterpret_cast<u32*>(smem);
  if (threadIdx.x == 0) *smem_last = atomicAdd(gmem_arrived, 1) == splits - 1 ? 1 : 0;
  __syncthreads();
  if (*smem_last == 0) return false;
  if (threadIdx.x == 0) *gmem_arrived = 0;  // for the next launch
  __threadfence();
  for (u32 i = 0; i < splits; ++i) {
#pragma unroll
    for (u32 n = 0; n < kTokenTiles; ++n) {
      const float4 part = __ldcg(gmem_unit + static_cast<u64>(i) * kBlockSums + n * kThreads);
      sum[n][0] = i == 0 ? part.x : sum[n][0] + part.x;
      sum[n][1] = i == 0 ? part.y : sum[n][1] + part.y;
      sum[n][2] = i == 0 ? part.z : sum[n][2] + part.z;
      sum[n][3] = i == 0 ? part.w : sum[n][3] + part.w;
    }
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    fused_hopper(const Matrix* gmem_matrices, u32 matrices, const u16* gmem_x, u16* gmem_out, u32 tokens, u32 cols,
                 u32 splits, u32* gmem_arrived, float4* gmem_sums) {
  DYNAMIC_SHARED(u8, smem_all);
  u8* smem = smem_all + (0u - shared_address(smem_all)) % kSwizzleBytes;
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const u32 unit = blockIdx.x / splits, split = blockIdx.x % splits;

  // The matrix of this block's unit, and this warp's stripe there.
  u32 stripes = 0, stripe = unit * kWarps;
  const Matrix* gmem_matrix = gmem_matrices;
  for (u32 m = 0;; ++m, ++gmem_matrix) {
    stripes = static_cast<u32>((gmem_matrix->rows + kTileRows - 1) / kTileRows);
    const u32 units = (stripes - 1) / kWarps + 1;
    if (stripe < units * kWarps || m + 1 == matrices) break;
    stripe -= units * kWarps;
  }
  stripe += warp;
  const Matrix matrix = *gmem_matrix;

  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 begin = split_begin(tiles_per_stripe, split, splits);
  const u32 end = split_begin(tiles_per_stripe, split + 1, splits);
  u16* smem_table = reinterpret_cast<u16*>(smem + 2 * kChunkBytes);
  u8* smem_ring = smem + 2 * kChunkBytes + kTableBytes + warp * kWarpBytes;
  u16* smem_decoded = reinterpret_cast<u16*>(smem_ring + kRingBytes);
  u8* smem_lists = smem_ring + kRingBytes + kDecodedBytes;

  // The first chunk of x and of lists, and as many tiles as the ring has room for. Warps without a stripe of their own
  // take the last one, for nothing.
  const Header header = load_header(matrix.gmem_header, lane);
  const u32 capacity = entry_capacity(matrix.escapes_bytes, header.wide);
  const u64 stripe_tile = static_cast<u64>(min(stripe, stripes - 1)) * tiles_per_stripe;
  const u8* gmem_tile = matrix.gmem_tiles + (stripe_tile + begin) * kTileBytes;  // the next one to be copied
  Lists lists;
  lists.gmem_offset = matrix.gmem_offsets + stripe_tile;
  lists.after = lists.load(begin, end, lane);
  lists.advance(matrix.gmem_escapes, header.wide, capacity, smem_lists, smem_ring + kRuns, begin + kStages, end, lane);
  const Activations x(gmem_x, smem, cols);
  const bool aligned = cols % 8 == 0 && reinterpret_cast<u64>(gmem_x) % 16 == 0;
  x.load(0, tokens, cols, begin * kTileCols, end * kTileCols, aligned);
  commit_copies();
  if (threadIdx.x < 64) smem_table[threadIdx.x] = static_cast<u16>(__ldg(matrix.gmem_header + threadIdx.x) << 7);
  if (lane < kSteps) mbarrier_init(barrier_of(smem_ring + lane * kStepBytes), 1);
  mbarrier_fence();
  __syncwarp();
  const auto copy_step = [&](u8* smem_step, u32 tile) {
    if (lane == 0) {
      const u32 bytes = tile + 1 < end ? 2 * kTileBytes : kTileBytes;
      mbarrier_arrive_expect(barrier_of(smem_step), bytes);
      copy_bulk(smem_step, gmem_tile, bytes, barrier_of(smem_step));
    }
    gmem_tile += kStepTiles * kTileBytes;
  };
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    if (begin + i * kStepTiles < end) copy_step(smem_ring + i * kStepBytes, begin + i * kStepTiles);
  }

  Sums sum = {};
  uint4 a[4];
  const u64 descriptor = wgmma_descriptor(shared_address(smem));
  u32 chunk = 0;
  for (u32 chunk_begin = begin; chunk_begin < end; chunk_begin += kStages, chunk ^= 1) {
    const u32 next_chunk = chunk_begin + kStages, chunk_end = min(next_chunk, end);
    await_copies<0>();
    fence_async();
    wgmma_wait<0>();
    __syncthreads();  // all threads' parts of this chunk of x are there; all have done with the one before
    if (next_chunk < end) x.load(chunk ^ 1, tokens, cols, next_chunk * kTileCols, end * kTileCols, aligned);
    lists.advance(matrix.gmem_escapes, header.wide, capacity, smem_lists + (chunk ^ 1) * kListBytes,
                  smem_ring + kRuns + (chunk ^ 1) * kStepTiles * kRunBytes, next_chunk + kStages, end, lane);
    commit_copies();

    u8* smem_step = smem_ring;
    const u8* smem_list = smem_lists + chunk * kListBytes + 2 * lane;
    u64 b = descriptor + chunk * (kChunkBytes / 16);
#pragma unroll 1
    for (u32 tile = chunk_begin; tile < chunk_end; tile += kStepTiles) {
      mbarrier_wait(barrier_of(smem_step), chunk);
      const uint2* smem_runs = reinterpret_cast<const uint2*>(smem_step + kRuns + chunk * kStepTiles * kRunBytes);
#pragma unroll
      for (u32 j = 0; j < kStepTiles; ++j) {
        if (j != 0 && tile + j >= end) break;
        const uint2 run = smem_runs[j];
        decode(smem_step + j * kTileBytes, smem_decoded, header.base_pair, lane);
        __syncwarp();  // the slot is read, the tile written
        if (j == kStepTiles - 1 && tile + kStages < end) copy_step(smem_step, tile + kStages);
        patch_run(smem_decoded, smem_table, smem_list, matrix.gmem_escapes, header.wide, run, lane);
        __syncwarp();
        wgmma_wait<0>();  // the products of the tile before: their weights' registers are free
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[i] = *fragment(smem_decoded, i, lane);
        wgmma_fence();
#pragma unroll
        for (u32 i = 0; i < 4; ++i) wgmma_bf16(sum, a[i], b + i * kDescriptorStep);
        wgmma_commit();
        b += kTileXBytes / 16;
      }
      smem_step += kStepBytes;
    }
  }
  wgmma_wait<0>();
  wgmma_settle(sum);

  if (splits > 1 && !add_splits(sum, gmem_sums, gmem_arrived + unit, unit, split, splits, smem)) return;
#pragma unroll
  for (u32 n = 0; n < kTokenTiles; ++n) {
    store_sums(sum[n], matrix.gmem_bias, gmem_out + matrix.rows_before * tokens, stripe, static_cast<u32>(matrix.rows),
               n * kMmaTokens, tokens, lane);
  }
}

#else

extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    fused_hopper(const Matrix*, u32, const u16*, u16*, u32, u32, u32, u32*, float4*) {
  __trap();  // no other architecture has these instructions
}

#endif
