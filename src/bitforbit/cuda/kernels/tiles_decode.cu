// Tiles to rows of plain weights. A warp takes a run of tiles side by side. It decodes a tile to shared memory, loads
// the next one into the registers that are free now, patches this one's escapes, a lane for each, and stores rows of
// 128 bytes.
//
// Safe for any content of the parts: what comes from memory is clamped before it becomes an address or a count.
#include "ldmatrix.cuh"
#include "tiles.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;

// Where a run's rows begin and end: row of the output that a tile's row 0 has, modulo 2^32, and number of rows. Rows
// before the first have numbers near 2^32; the output has fewer than 2^31.
struct Rows {
  u32 first, count;
};

// Writes a warp's tile, patched and staged, to the output; `cols` is a multiple of 8. Matrix t of ldmatrix n takes
// register t of two quads of lanes in all four steps, so that lane (a, t) gets 16 bytes of row 2n + a div 4 + 8 * (t
// mod 2), and eight lanes have a row's 128 bytes. Stores are ordinary: who multiplies by the matrix next finds it in
// L2.
__device__ __forceinline__ void store_tile_wide(const u16* smem_tile, u32 lane, Element* gmem_out, Rows rows, u32 col,
                                                u32 cols) {
  const u32 step = lane & 3, quad = lane >> 2 & 1, source = lane >> 3;
  const u16* smem_row = smem_tile + 256 * step + 32 * quad + 8 * (source ^ step);
  const u32 row = rows.first + (lane >> 4) + 8 * (lane & 1);
  col += 16 * (lane >> 2 & 3) + 8 * (lane >> 1 & 1);
  Element* gmem = gmem_out + static_cast<i64>(static_cast<i32>(row)) * cols + col;
#pragma unroll
  for (u32 n = 0; n < 4; ++n) {
    const uint4 weights = ldmatrix_x4(smem_row + 64 * n);
    if (row + 2 * n < rows.count && col < cols) *reinterpret_cast<Eight*>(gmem) = to_elements(weights);
    gmem += 2 * static_cast<u64>(cols);
  }
}

// The same for any number of columns, 4 bytes at a time: lane l has columns 2l and 2l + 1. Where a row begins at an odd
// element, the two that lie in one word are a high half and the next lane's low half.
__device__ __forceinline__ void store_tile_any(const u16* smem_tile, u32 lane, Element* gmem_out, Rows rows, u32 col,
                                               u32 cols) {
  const u32 step = lane >> 3;
  const u16* smem_pair = smem_tile + 256 * step + 8 * ((lane & 3) ^ step) + 4 * (lane >> 2 & 1);
  col += 2 * lane;
#pragma unroll 4
  for (u32 r = 0; r < kTileRows; ++r) {
    const u32 row = rows.first + r, pair = *reinterpret_cast<const u32*>(smem_pair + 32 * (r % 8) + 2 * (r / 8));
    const u32 next = __shfl_down_sync(kAllLanes, pair, 1);
    if (row >= rows.count) continue;
    const u64 index = static_cast<u64>(row) * cols + col;
    Element* gmem = gmem_out + index;
    if constexpr (sizeof(Element) == 1) {  // few matrices are of such sizes
      if (col < cols) gmem[0] = to_element(pair);
      if (col + 1 < cols) gmem[1] = to_element(pair >> 16);
    } else if (index % 2 == 0) {
      if (col + 1 < cols) {
        *reinterpret_cast<u32*>(gmem) = pair;
      } else if (col < cols) {
        *gmem = static_cast<u16>(pair);
      }
    } else {
      if (lane == 0) *gmem = static_cast<u16>(pair);
      if (lane < kWarp - 1 && col + 2 < cols) {
        *reinterpret_cast<u32*>(gmem + 1) = pair >> 16 | next << 16;
      } else if (col + 1 < cols) {
        gmem[1] = static_cast<u16>(pair >> 16);
      }
    }
  }
}

// Rows [begin, begin + rows) of the matrix go to gmem_out [rows, cols].
template <bool kWideStores>
__device__ __forceinline__ void decode_run(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes,
                                           const u32* gmem_offsets, const u8* gmem_header, Element* gmem_out, u32 cols,
                                           u32 begin, u32 rows, u32 run_tiles, u32 runs_per_stripe, u32 runs,
                                           u16* smem_tile) {
  const u32 lane = threadIdx.x % kWarp, run = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (run >= runs) return;
  const u32 tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 stripe = begin / kTileRows + run / runs_per_stripe, first = run % runs_per_stripe * run_tiles;
  const u32 count = min(run_tiles, tiles_per_stripe - first);
  const u64 tile = static_cast<u64>(stripe) * tiles_per_stripe + first;
  const u8* gmem_tile = gmem_tiles + tile * kTileBytes;

  Lane share;
  load_lane(gmem_tile, lane, share);
  const Header header = load_header(gmem_header, lane);
  const RunEscapes escapes =
      load_run_escapes(gmem_offsets, tile, count, entry_capacity(escapes_bytes, header.wide), lane);
  u32 first_entry = __shfl_sync(kAllLanes, escapes.first, 0), entries = __shfl_sync(kAllLanes, escapes.count, 0);
  u32 entry = lane < entries ? load_entry(gmem_escapes, first_entry + lane, header.wide) : 0;

  for (u32 j = 0; j < count; ++j) {
    u32 pair[kPairs];
    decode_lane(share, header.base, pair);
    stage(pair, smem_tile, lane);
    const u32 this_first = first_entry, this_entries = entries, this_entry = entry;
    if (j + 1 < count) {
      gmem_tile += kTileBytes;
      load_lane(gmem_tile, lane, share);
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
                 const u8* gmem_header, Element* gmem_out, u32 cols, u32 begin, u32 rows, u32 run_tiles,
                 u32 runs_per_stripe, u32 runs) {
  SHARED(u16, smem_tiles, kWarps * kTileWeights);
  decode_run<true>(gmem_tiles, gmem_escapes, escapes_bytes, gmem_offsets, gmem_header, gmem_out, cols, begin, rows,
                   run_tiles, runs_per_stripe, runs, smem_tiles + threadIdx.x / kWarp * kTileWeights);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_decode_any(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes, const u32* gmem_offsets,
                     const u8* gmem_header, Element* gmem_out, u32 cols, u32 begin, u32 rows, u32 run_tiles,
                     u32 runs_per_stripe, u32 runs) {
  SHARED(u16, smem_tiles, kWarps * kTileWeights);
  decode_run<false>(gmem_tiles, gmem_escapes, escapes_bytes, gmem_offsets, gmem_header, gmem_out, cols, begin, rows,
                    run_tiles, runs_per_stripe, runs, smem_tiles + threadIdx.x / kWarp * kTileWeights);
}
