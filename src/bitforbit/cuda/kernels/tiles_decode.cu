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

// Where a run's rows begin and end: row of the output that a tile's row 0 has, modulo 2^32, and number of rows. Rows
// before the first have numbers near 2^32; the output has fewer than 2^31.
struct Rows {
  u32 first, count;
};

// Writes a warp's tile, patched and staged, to the output; `cols` is a multiple of 8. Matrix t of ldmatrix n takes
// register t of two quads of lanes in all four steps, so that lane (a, t) gets 16 bytes of row 2n + a div 4 + 8 * (t
// mod 2), and eight lanes have a row's 128 bytes. Stores are ordinary: who multiplies by the matrix next finds it in
// L2.
__device__ __forceinline__ void store_tile_wide(const u16* smem_tile, u32 lane, u16* gmem_out, Rows rows, u32 col,
                                                u32 cols) {
  const u32 step = lane & 3, quad = lane >> 2 & 1, source = lane >> 3;
  const u16* smem_row = smem_tile + 256 * step + 32 * quad + 8 * (source ^ step);
  const u32 row = rows.first + (lane >> 4) + 8 * (lane & 1);
  col += 16 * (lane >> 2 & 3) + 8 * (lane >> 1 & 1);
  u16* gmem = gmem_out + static_cast<i64>(static_cast<i32>(row)) * cols + col;
#pragma unroll
  for (u32 n = 0; n < 4; ++n) {
    const uint4 weights = ldmatrix_x4(smem_row + 64 * n);
    if (row + 2 * n < rows.count && col < cols) *reinterpret_cast<uint4*>(gmem) = weights;
    gmem += 2 * static_cast<u64>(cols);
  }
}

// The same for any number of columns, weight by weight.
__device__ __forceinline__ void store_tile_any(const u16* smem_tile, u32 lane, u16* gmem_out, Rows rows, u32 col,
                                               u32 cols) {
  for (u32 i = lane; i < kTileWeights; i += kWarp) {
    const u32 r = i / kTileCols, c = i % kTileCols, row = rows.first + r;
    const u32 position = c / 16 * 256 + r % 8 * 32 + c % 8 / 2 * 8 + (c / 8 % 2 * 2 + r / 8) * 2 + c % 2;
    if (row < rows.count && c < cols - col)
      gmem_out[static_cast<u64>(row) * cols + col + c] = smem_tile[staged(position)];
  }
}

// Puts the exponents of a tile's escapes in place: lane e has entry e. Called by all lanes of a warp.
__device__ __forceinline__ void patch(u16* smem_tile, u32 lane, const u8* gmem_escapes, u32 entry, u32 first,
                                      u32 entries, const Header& header) {
  for (u32 done = 0;;) {
    const u32 exponent = entry_exponent(entry, header);
    if (done + lane < entries) {
      u16* weight = smem_tile + staged(entry & (kTileWeights - 1));  // [9:0] position
      *weight = with_exponent(*weight, exponent);
    }
    done += kWarp;
    if (done >= entries) return;  // more than 32 are rare
    entry = done + lane < entries ? load_entry(gmem_escapes, first + done + lane, header.wide) : 0;
  }
}

// Rows [begin, begin + rows) of the matrix go to gmem_out [rows, cols].
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

  u32 word[8], code[3];
  load_lane(gmem_tile, lane, word, code);
  const Header header = load_header(gmem_header, lane);
  const RunEscapes escapes =
      load_run_escapes(gmem_offsets, tile, count, entry_capacity(escapes_bytes, header.wide), lane);
  u32 first_entry = __shfl_sync(kAllLanes, escapes.first, 0), entries = __shfl_sync(kAllLanes, escapes.count, 0);
  u32 entry = lane < entries ? load_entry(gmem_escapes, first_entry + lane, header.wide) : 0;

  for (u32 j = 0; j < count; ++j) {
    u32 pair[kPairs];
    decode_lane(word, code, header.base_pair, pair);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      *reinterpret_cast<uint4*>(smem_tile + staged(256 * i + 8 * lane)) =
          make_uint4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
    }
    const u32 this_first = first_entry, this_entries = entries, this_entry = entry;
    if (j + 1 < count) {
      gmem_tile += kTileBytes;
      load_lane(gmem_tile, lane, word, code);
    }
    first_entry = __shfl_sync(kAllLanes, escapes.first, static_cast<int>(j + 1));
    entries = __shfl_sync(kAllLanes, escapes.count, static_cast<int>(j + 1));  // 0 after the last tile
    if (lane < entries) entry = load_entry(gmem_escapes, first_entry + lane, header.wide);
    __syncwarp();
    patch(smem_tile, lane, gmem_escapes, this_entry, this_first, this_entries, header);
    __syncwarp();
    const Rows output{stripe * kTileRows - begin, rows};
    if (kWideStores) {
      store_tile_wide(smem_tile, lane, gmem_out, output, (first + j) * kTileCols, cols);
    } else {
      store_tile_any(smem_tile, lane, gmem_out, output, (first + j) * kTileCols, cols);
    }
    __syncwarp();  // all have read the tile before the next one takes its place
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
