// Tiles to BF16 rows. A warp takes a run of tiles side by side; of each it loads the next tile's words and escapes,
// decodes this one's to shared memory, patches the escapes there, one per lane, and stores whole rows of 128 bytes.
//
// Safe for any content of the parts: what comes from memory is clamped before it becomes an address or a count.
#include "ldmatrix.cuh"
#include "tiles.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;

// A run's escapes: lane j has the first entry and the number of entries of the run's tile j. At most 31 tiles.
struct RunEscapes {
  u32 first, count;
};

__device__ __forceinline__ RunEscapes load_run_escapes(const u32* gmem_offsets, u64 tile, u32 tiles, u32 capacity,
                                                       u32 lane) {
  const u32 first = min(__ldg(gmem_offsets + tile + min(lane, tiles)), capacity);
  const u32 next = __shfl_down_sync(kAllLanes, first, 1);
  return {first, next > first ? min(next - first, kTileWeights) : 0};
}

// Writes a warp's tile, patched and staged, to the output. Rows of 16 bytes times a whole number: `cols` is a multiple
// of 8. Matrix t of ldmatrix n takes registers t of 2 lanes' quads and all 4 steps, so that lane (a, t) gets 16 bytes
// of row 2n + a div 4 + 8 * (t mod 2), and eight lanes have a row of 128 bytes.
__device__ __forceinline__ void store_tile_wide(const u16* smem_tile, u32 lane, u16* gmem_out, i64 row, u32 rows,
                                                u32 col, u32 cols) {
  const u32 step = lane & 3, quad = lane >> 2 & 1, source = lane >> 3;
  const u16* smem_row = smem_tile + 256 * step + 32 * quad + 8 * (source ^ step);
  row += (lane >> 4) + 8 * (lane & 1);
  col += 16 * (lane >> 2 & 3) + 8 * (lane >> 1 & 1);
  u16* gmem = gmem_out + row * static_cast<i64>(cols) + col;
#pragma unroll
  for (u32 n = 0; n < 4; ++n) {
    const uint4 weights = ldmatrix_x4(smem_row + 64 * n);
    // Rows before the first have a large unsigned number.
    if (static_cast<u64>(row + 2 * n) < rows && col < cols) store_once(reinterpret_cast<uint4*>(gmem), weights);
    gmem += 2 * static_cast<u64>(cols);
  }
}

// The same for any number of columns, weight by weight.
__device__ __forceinline__ void store_tile_any(const u16* smem_tile, u32 lane, u16* gmem_out, i64 row, u32 rows,
                                               u32 col, u32 cols) {
  for (u32 i = lane; i < kTileWeights; i += kWarp) {
    const u32 r = i / kTileCols, c = i % kTileCols;
    const u32 position = c / 16 * 256 + r % 8 * 32 + c % 8 / 2 * 8 + (c / 8 % 2 * 2 + r / 8) * 2 + c % 2;
    if (static_cast<u64>(row + r) < rows && c < cols - col) {
      store_once(gmem_out + (row + r) * static_cast<i64>(cols) + col + c, smem_tile[staged(position)]);
    }
  }
}

// Stripe `stripe` is the one of row 16 * stripe; rows [begin, begin + rows) of the matrix go to gmem_out [rows, cols].
template <bool kWideStores>
__device__ __forceinline__ void decode_run(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes,
                                           const u32* gmem_offsets, const u8* gmem_header, u16* gmem_out, u32 cols,
                                           u32 begin, u32 rows, u32 run_tiles, u32 runs_per_stripe, u32 runs,
                                           u16* smem_tile) {
  const u32 lane = threadIdx.x % kWarp, run = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (run >= runs) return;
  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 stripe = begin / kTileRows + run / runs_per_stripe, first = run % runs_per_stripe * run_tiles;
  const u32 count = min(run_tiles, tiles_per_stripe - first);
  const u64 tile = static_cast<u64>(stripe) * tiles_per_stripe + first;
  const u8* gmem_tile = gmem_tiles + tile * kTileBytes;
  const i64 row = static_cast<i64>(stripe) * kTileRows - begin;

  u32 word[8], code[3];
  load_lane(gmem_tile, lane, word, code);
  const Header header = load_header(gmem_header, lane);
  const RunEscapes escapes =
      load_run_escapes(gmem_offsets, tile, count, entry_capacity(escapes_bytes, header.wide), lane);
  u32 entry_at = __shfl_sync(kAllLanes, escapes.first, 0), entries = __shfl_sync(kAllLanes, escapes.count, 0);
  u32 entry = lane < entries ? load_entry(gmem_escapes, entry_at + lane, header.wide) : 0;

  for (u32 j = 0;; ++j) {
    const bool more = j + 1 < count;
    u32 next_word[8] = {}, next_code[3] = {};
    if (more) load_lane(gmem_tile + kTileBytes, lane, next_word, next_code);
    const u32 next_at = __shfl_sync(kAllLanes, escapes.first, j + 1);
    const u32 next_entries = more ? __shfl_sync(kAllLanes, escapes.count, j + 1) : 0;
    const u32 next_entry = lane < next_entries ? load_entry(gmem_escapes, next_at + lane, header.wide) : 0;

    u32 pair[kPairs];
    decode_lane(word, code, header.base_pair, pair);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(smem_tile + staged(256 * i + 8 * lane)) =
          make_uint4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
    }
    __syncwarp();
    for (u32 e = lane;; e += kWarp) {
      const u32 exponent = entry_exponent(entry, header);
      if (e < entries) {
        u16* weight = smem_tile + staged(entry & (kTileWeights - 1));  // [9:0] position
        *weight = with_exponent(*weight, exponent);
      }
      if (e - lane + kWarp >= entries) break;  // more than 32 are rare
      entry = e + kWarp < entries ? load_entry(gmem_escapes, entry_at + e + kWarp, header.wide) : 0;
    }
    __syncwarp();
    const u32 col = (first + j) * kTileCols;
    if (kWideStores) {
      store_tile_wide(smem_tile, lane, gmem_out, row, rows, col, cols);
    } else {
      store_tile_any(smem_tile, lane, gmem_out, row, rows, col, cols);
    }
    if (!more) break;
    __syncwarp();  // all have read the tile before the next one takes its place
#pragma unroll
    for (u32 w = 0; w < 8; ++w) word[w] = next_word[w];
#pragma unroll
    for (u32 w = 0; w < 3; ++w) code[w] = next_code[w];
    entry_at = next_at, entries = next_entries, entry = next_entry;
    gmem_tile += kTileBytes;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_decode(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes, const u32* gmem_offsets,
                 const u8* gmem_header, u16* gmem_out, u32 cols, u32 begin, u32 rows, u32 run_tiles,
                 u32 runs_per_stripe, u32 runs) {
  SHARED(u16, smem_tiles, kWarps * kTileWeights);
  decode_run<true>(gmem_tiles, gmem_escapes, escapes_bytes, gmem_offsets, gmem_header, gmem_out, cols, begin, rows,
                   run_tiles, runs_per_stripe, runs, smem_tiles + threadIdx.x / kWarp * kTileWeights);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_decode_any(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes, const u32* gmem_offsets,
                     const u8* gmem_header, u16* gmem_out, u32 cols, u32 begin, u32 rows, u32 run_tiles,
                     u32 runs_per_stripe, u32 runs) {
  SHARED(u16, smem_tiles, kWarps * kTileWeights);
  decode_run<false>(gmem_tiles, gmem_escapes, escapes_bytes, gmem_offsets, gmem_header, gmem_out, cols, begin, rows,
                    run_tiles, runs_per_stripe, runs, smem_tiles + threadIdx.x / kWarp * kTileWeights);
}
