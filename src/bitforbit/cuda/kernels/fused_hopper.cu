// The product of fused_linear.cu (same parameters, same parts, same order of summation) by the instructions of one
// architecture, sm_90a: the tensor cores take the weights from the registers of four warps, 64 rows at once, and x from
// shared memory by themselves, while the warps decode the next tile.
//
// A block has kWarps stripes of 16 rows (a unit) and a range of columns (a split). Its warps share x, which comes in
// chunks of kChunk tiles' columns; each streams its own tiles through a ring of kStages in shared memory by bulk
// copies. For a tile: decode it into registers; put them to shared memory, where its escapes are patched; wait for the
// products of the tile before; take the weights back as fragment a; issue the products. Sums of the splits of a unit
// meet in device memory; the block that comes last adds them up, in the order that the rules ask for, whoever that is.
//
// Safe for any content of the parts: what comes from memory is clamped before it becomes an address or a count.
//
// BITFORBIT_TOKENS (8, 16, 32, 64), BITFORBIT_WARPS, BITFORBIT_STAGES, BITFORBIT_BLOCKS and BITFORBIT_CHUNK: see
// cuda/fused/plan.py; BITFORBIT_WEIGHTS: tiles.cuh.
#include "fused_splits.cuh"
#include "wgmma.cuh"

constexpr u32 kTokens = BITFORBIT_TOKENS, kTokenTiles = kTokens / kMmaTokens, kStages = BITFORBIT_STAGES;
constexpr u32 kChunk = BITFORBIT_CHUNK;
constexpr u32 kWarps = BITFORBIT_WARPS, kThreads = kWarps * kWarp;

#if defined(BITFORBIT_CUDA_SHIM) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Shared memory, in bytes, on kSwizzleBytes: two chunks of x, for each tile a swizzled matrix [kTokens, 64]; the table
// of escapes' exponents; then for each warp the steps of its ring, each of two tiles, which come together, and their
// barrier; a decoded tile; and for two chunks the lists of escapes and each tile's run in them.
constexpr u32 kTileXBytes = 2 * kTokens * kTileCols, kChunkBytes = kChunk * kTileXBytes;
constexpr u32 kTableBytes = 128, kDecodedBytes = 2 * kTileWeights;
constexpr u32 kStepTiles = 2, kBarrier = kStepTiles * kTileBytes, kStepBytes = kBarrier + 16;
constexpr u32 kSteps = kStages / kStepTiles, kRingBytes = kSteps * kStepBytes;
constexpr u32 kListBytes = 128 * kChunk, kListEntries = kListBytes / 2, kRunsBytes = 8 * kChunk;
constexpr u32 kWarpBytes = kRingBytes + kDecodedBytes + 2 * (kListBytes + kRunsBytes);
static_assert(kStages % kStepTiles == 0 && kChunk % kStages == 0 && kChunk % 4 == 0, "whole steps, rings and lists");

__device__ __forceinline__ u64* barrier_of(u8* smem_step) { return reinterpret_cast<u64*>(smem_step + kBarrier); }

// Columns of x, a chunk at a time, to shared memory. A thread has the same pieces of 16 bytes, one in four tiles, of
// every eighth token or fewer.
struct Activations {
  static constexpr u32 kPieces = 32, kTokensAtOnce = kThreads / kPieces, kTokenBytes = 128;
  static_assert(kTokensAtOnce % 8 == 0, "tokens of a thread are swizzled alike; and whole warpgroups");

  const u8* gmem;  // of its first token and piece, in a chunk that begins at column 0
  u8* smem;        // of the same, in the first of the two chunks
  u64 further;     // bytes to its next token
  u32 token, col;

  __device__ __forceinline__ Activations(const u16* gmem_x, u8* smem_x, u32 cols)
      : token(threadIdx.x / kPieces), col(8 * (threadIdx.x % kPieces)) {
    const u32 piece = threadIdx.x % kPieces;
    gmem = reinterpret_cast<const u8*>(gmem_x + static_cast<u64>(token) * cols + col);
    smem = kept(smem_x + piece / 8 * kTileXBytes + swizzled(token, piece % 8));
    further = static_cast<u64>(2 * kTokensAtOnce) * cols;
  }

  // Columns [begin, end), of a chunk at most; zeros for those that x does not have. Tokens that it does not have may be
  // garbage: no other token's sums depend on them.
  __device__ __forceinline__ void load(u32 chunk, u32 tokens, u32 cols, u32 begin, u32 end, bool aligned) const {
#pragma unroll
    for (u32 part = 0; part < kChunk / 4; ++part) {
      const u32 at = begin + 4 * kTileCols * part + col;
      if (at >= end) return;
      const u8* gmem_from = gmem + 2 * static_cast<u64>(begin + 4 * kTileCols * part);
      u8* smem_to = smem + chunk * kChunkBytes + 4 * kTileXBytes * part;
      if (aligned) {
#pragma unroll
        for (u32 i = 0; i < (kTokens + kTokensAtOnce - 1) / kTokensAtOnce; ++i) {
          if (token + i * kTokensAtOnce < tokens) {
            copy_async_or_zeros(smem_to + i * kTokensAtOnce * kTokenBytes, gmem_from, at < cols);
          }
          gmem_from += further;
        }
      } else {
        load_words(smem_to, gmem_from, tokens, at < cols ? min(cols - at, 8u) : 0);
      }
    }
  }

  // The same for one piece, of which so many columns are there, at any address.
  __device__ __forceinline__ void load_words(u8* smem_to, const u8* gmem_from, u32 tokens, u32 there) const {
#pragma unroll 1
    for (u32 t = token; t < tokens; t += kTokensAtOnce) {
#pragma unroll 1
      for (u32 i = 0; i < 8; ++i) {
        reinterpret_cast<u16*>(smem_to)[i] = i < there ? __ldg(reinterpret_cast<const u16*>(gmem_from) + i) : u16{0};
      }
      smem_to += kTokensAtOnce * kTokenBytes;
      gmem_from += further;
    }
  }
};

// A stripe's lists of escapes, a chunk ahead: their beginnings come two chunks before they are used, the entries one.
// A tile's run in shared memory has the byte at which its first entry is in the list there, and their number; or, where
// they are not there, wide ones and those that the list has no room for, the first entry in device memory, and their
// number + kElsewhere.
constexpr u32 kElsewhere = 1 << 16;
struct Lists {
  const u32* gmem_offset;  // this lane's in the chunk after the next one, should it be there
  u32 after;               // lane j: entries before tile j of that chunk; not clamped yet

  // Lane kChunk has what the next chunk's lane 0 has.
  __device__ __forceinline__ void load(u32 tile, u32 end, u32 lane) {
    after = lane <= kChunk && tile + lane <= end ? __ldg(gmem_offset) : 0xFFFFFFFFu;
    gmem_offset += kChunk;
  }

  // On to the next chunk: its entries, from a multiple of 16 bytes on, as far as there is room. `tile` is the first one
  // of the chunk after it.
  __device__ __forceinline__ void advance(const u8* gmem_escapes, u32 wide, u32 capacity, u8* smem_list,
                                          uint2* smem_runs, u32 tile, u32 end, u32 lane) {
    const u32 first = min(after, capacity), following = __shfl_down_sync(kAllLanes, first, 1);
    const u32 begin = __shfl_sync(kAllLanes, first, 0) & ~7u, last = __shfl_sync(kAllLanes, first, kChunk);
    load(tile, end, lane);
#pragma unroll
    for (u32 part = 0; part < kChunk / 4; ++part) {
      const u32 at = 8 * (part * kWarp + lane);  // the first of 16 bytes of entries
      if (wide == 0 && begin + at < last) copy_async(smem_list + 2 * at, gmem_escapes + 2 * (u64{begin} + at));
    }
    if (lane < kChunk) {
      const u32 entries = following > first ? min(following - first, kTileWeights) : 0, place = first - begin;
      const bool here = wide == 0 && entries <= kListEntries && place <= kListEntries - entries;
      smem_runs[lane] = here ? make_uint2(2 * place, entries) : make_uint2(first, entries + kElsewhere);
    }
  }
};

// A tile's weights in shared memory are in the order of their positions: a lane's fragment of a product is 16 bytes,
// the next one 512 bytes further.
constexpr u32 kFragments = kTileWeights / 256, kFragmentStep = kWarp;

// Decodes this lane's part of a tile, words and codes, into shared memory; escapes are still missing.
__device__ __forceinline__ void decode(const u8* smem_words, const u8* smem_codes, uint4* smem_fragment, u32 base) {
  Lane share;
  u32 pair[kPairs];
  read_lane(smem_words, smem_codes, Resident{}, share);
  decode_lane(share, base, pair);
#pragma unroll
  for (u32 i = 0; i < kFragments; ++i) {
    smem_fragment[i * kFragmentStep] = make_uint4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
  }
}

template <u32 kTiles>
__device__ __forceinline__ void multiply_async(float (&sum)[kTiles][4], const uint4& a, u64 b) {
  if constexpr (kF16) {
    wgmma_f16(sum, a, b);
  } else {
    wgmma_bf16(sum, a, b);
  }
}

// Puts the exponents of a tile's escapes in place. smem_list: the list of its chunk, from entry `lane` on.
__device__ __forceinline__ void patch_run(u16* smem_decoded, const u16* smem_table, const u8* smem_list, uint2 run,
                                          u32 lane) {
  const u16* smem_entry = reinterpret_cast<const u16*>(smem_list + run.x);
#pragma unroll 1
  for (u32 i = lane; i < run.y; i += kWarp, smem_entry += kWarp) {
    const u32 entry = *smem_entry;
    u16* weight = smem_decoded + (entry & (kTileWeights - 1));  // [9:0] position, [15:10] index
    *weight = static_cast<u16>((*weight & ~kExponentBits) | smem_table[entry >> 10]);
  }
}

// The same for a run in device memory.
__device__ __forceinline__ void patch_elsewhere(u16* smem_decoded, const u16* smem_table, const u8* gmem_escapes,
                                                u32 wide, uint2 run, u32 lane) {
#pragma unroll 1
  for (u32 i = lane; i < run.y - kElsewhere; i += kWarp) {
    const u32 entry = load_entry(gmem_escapes, run.x + i, wide);
    const u32 exponent =
        wide ? (entry >> 16 & 0xFF) << kExponentShift : smem_table[entry >> 10];  // [23:16] of a wide one
    u16* weight = smem_decoded + (entry & (kTileWeights - 1));
    *weight = static_cast<u16>((*weight & ~kExponentBits) | exponent);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    fused_hopper(const Matrix* gmem_matrices, u32 matrices, const u16* gmem_x, u16* gmem_out, u32 tokens, u32 cols,
                 u32 splits, u32 split_tiles, u32 order_rules, u32* gmem_arrived, float4* gmem_sums) {
  DYNAMIC_SHARED(u8, smem_all);
  u8* smem = smem_all + (0u - shared_address(smem_all)) % kSwizzleBytes;
  const u32 warp = __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0), lane = kept(threadIdx.x % kWarp);
  const u32 unit = blockIdx.x / splits, split = blockIdx.x % splits;

  // The matrix of this block's unit, and this warp's stripe there.
  u32 stripes = 0, stripe = unit * kWarps;
  const Matrix* gmem_matrix = gmem_matrices;
  for (u32 m = 0;; ++m, ++gmem_matrix) {
    stripes = (gmem_matrix->rows + kTileRows - 1) / kTileRows;
    const u32 units = (stripes - 1) / kWarps + 1;
    if (stripe < units * kWarps || m + 1 == matrices) break;
    stripe -= units * kWarps;
  }
  stripe += warp;
  const Matrix matrix = *gmem_matrix;

  const Rules rules{order_rules};
  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 begin = split_begin(tiles_per_stripe, split, splits, split_tiles, rules);
  const u32 end = split_begin(tiles_per_stripe, split + 1, splits, split_tiles, rules);
  u16* smem_table = kept(reinterpret_cast<u16*>(smem + 2 * kChunkBytes));
  u8* smem_ring = smem + 2 * kChunkBytes + kTableBytes + warp * kWarpBytes;
  u16* smem_decoded = kept(reinterpret_cast<u16*>(smem_ring + kRingBytes));
  uint4* smem_fragment = kept(reinterpret_cast<uint4*>(smem_decoded) + lane);
  u8* smem_lists = smem_ring + kRingBytes + kDecodedBytes;
  uint2* smem_runs = reinterpret_cast<uint2*>(smem_lists + 2 * kListBytes);

  // As many tiles as the ring has room for, which start on their way before all else. Warps without a stripe of their
  // own take the last one, for nothing.
  const u64 stripe_tile = static_cast<u64>(min(stripe, stripes - 1)) * tiles_per_stripe;
  const u8* gmem_tile = matrix.gmem_tiles + (stripe_tile + begin) * kTileBytes;  // the next one to be copied
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

  // The first chunk of x and of lists.
  Lists lists;
  lists.gmem_offset = matrix.gmem_offsets + stripe_tile + begin + lane;
  lists.load(begin, end, lane);
  const Activations x(gmem_x, smem, cols);
  const bool aligned = cols % 8 == 0 && reinterpret_cast<u64>(gmem_x) % 16 == 0;
  x.load(0, tokens, cols, begin * kTileCols, end * kTileCols, aligned);
  const Header header = load_header(matrix.gmem_header, lane);
  const u32 capacity = entry_capacity(matrix.escapes_bytes, header.wide);
  if (threadIdx.x < 64)
    smem_table[threadIdx.x] = static_cast<u16>(__ldg(matrix.gmem_header + threadIdx.x) << kExponentShift);
  lists.advance(matrix.gmem_escapes, header.wide, capacity, smem_lists, smem_runs, begin + kChunk, end, lane);
  commit_copies();

  float sum[kTokenTiles][4] = {};
  uint4 a[4];
  const u64 descriptor = wgmma_descriptor(shared_address(smem));
  u32 chunk = 0, phase = 0;
  for (u32 chunk_begin = begin; chunk_begin < end; chunk_begin += kChunk, chunk ^= 1) {
    const u32 next_chunk = chunk_begin + kChunk, chunk_end = min(next_chunk, end);
    await_copies<0>();
    fence_async();
    wgmma_wait<0>();
    __syncthreads();  // all threads' parts of this chunk of x are there; all have done with the one before
    if (next_chunk < end) x.load(chunk ^ 1, tokens, cols, next_chunk * kTileCols, end * kTileCols, aligned);
    lists.advance(matrix.gmem_escapes, header.wide, capacity, smem_lists + (chunk ^ 1) * kListBytes,
                  smem_runs + (chunk ^ 1) * kChunk, next_chunk + kChunk, end, lane);
    commit_copies();

    const u8* smem_list = kept(smem_lists + chunk * kListBytes + 2 * lane);
    const uint2* smem_run = kept(smem_runs + chunk * kChunk);
    u64 b = descriptor + chunk * (kChunkBytes / 16);
#pragma unroll 1
    for (u32 tile = chunk_begin; tile < chunk_end; phase ^= 1) {
      const u32 ring_end = kept(min(tile + kStages, chunk_end));
      u8* smem_step = kept(smem_ring);
      const u8* smem_words = kept(smem_ring + 16 * lane);
      const u8* smem_codes = kept(smem_ring + kTileCodes + kLaneCodeBytes * lane);
#pragma unroll 1
      for (; tile < ring_end; tile += kStepTiles) {
        mbarrier_wait(barrier_of(smem_step), phase);
#pragma unroll
        for (u32 j = 0; j < kStepTiles; ++j) {
          if (j != 0 && tile + j >= end) break;
          const uint2 run = smem_run[j];
          decode(smem_words + j * kTileBytes, smem_codes + j * kTileBytes, smem_fragment, header.base);
          __syncwarp();  // the slot is read, the tile written
          if (j == kStepTiles - 1 && tile + kStages < end) copy_step(smem_step, tile + kStages);
          if (run.y < kElsewhere) {
            patch_run(smem_decoded, smem_table, smem_list, run, lane);
          } else {
            patch_elsewhere(smem_decoded, smem_table, matrix.gmem_escapes, header.wide, run, lane);
          }
          __syncwarp();
          wgmma_wait<0>();  // the products of the tile before: their weights' registers are free
#pragma unroll
          for (u32 i = 0; i < 4; ++i) a[i] = operand(smem_fragment[i * kFragmentStep]);
          wgmma_fence();
#pragma unroll
          for (u32 i = 0; i < 4; ++i) multiply_async(sum, a[i], b + i * kDescriptorStep);
          wgmma_commit();
          b += kTileXBytes / 16;
        }
        smem_step += kStepBytes;
        smem_words += kStepBytes;
        smem_codes += kStepBytes;
        smem_run += kStepTiles;
      }
    }
  }
  wgmma_wait<0>();
  wgmma_settle(sum);

  if (splits > 1 && !add_splits<kThreads>(sum, gmem_sums, gmem_arrived + unit, unit, split, splits, rules, smem)) {
    return;
  }
  const Bias bias = load_bias(matrix, stripe, lane);
#pragma unroll
  for (u32 n = 0; n < kTokenTiles; ++n) {
    store_sums(sum[n], bias, gmem_out + matrix.rows_before * tokens, stripe, matrix.rows, n * kMmaTokens, tokens, lane,
               rules);
  }
}

#else

extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    fused_hopper(const Matrix*, u32, const u16*, u16*, u32, u32, u32, u32, u32, u32*, float4*) {
  __trap();  // no other architecture has these instructions
}

#endif
