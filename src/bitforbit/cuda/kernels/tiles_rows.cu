// Rows of a matrix in tiles, by id. A warp takes a row's weights in 8 tiles (512 columns): four lanes hold one tile's,
// in the register order of rows q and q + 8, decode both and keep one, then look through the tile's escapes together.
//
// Safe for any content of the parts and any id.
#include "tiles.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;
constexpr u32 kWarpTiles = 8, kWarpCols = kWarpTiles * kTileCols;
constexpr u32 kTilePitch = kTileCols + 8;  // half-words between tiles in shared memory: quads write to different banks
constexpr u32 kIndexOutOfRange = 2;

__device__ __forceinline__ u64 load_id(const void* gmem_ids, u32 id_bytes, u64 index) {
  if (id_bytes == 8) return static_cast<const u64*>(gmem_ids)[index];
  return static_cast<u64>(static_cast<i64>(static_cast<const i32*>(gmem_ids)[index]));  // negative: very large
}

extern "C" __global__ void __launch_bounds__(kThreads)
    tiles_rows(const u8* gmem_tiles, const u8* gmem_escapes, u64 escapes_bytes, const u32* gmem_offsets,
               const u8* gmem_header, const void* gmem_ids, u32 id_bytes, u64 count, Element* gmem_out, u32 rows,
               u32 cols, u32* gmem_status) {
  SHARED(u16, smem_rows, kWarps * kWarpTiles * kTilePitch);
  u16* smem_row = smem_rows + threadIdx.x / kWarp * (kWarpTiles * kTilePitch);
  const u32 lane = threadIdx.x % kWarp, tiles_per_stripe = (cols - 1) / kTileCols + 1;
  const u32 groups = (tiles_per_stripe - 1) / kWarpTiles + 1;
  const u64 warp = static_cast<u64>(blockIdx.x) * kWarps + threadIdx.x / kWarp, index = warp / groups;
  if (index >= count) return;
  const u32 group = static_cast<u32>(warp % groups);
  const u64 row = load_id(gmem_ids, id_bytes, index);
  if (row >= rows && lane == 0 && group == 0 && gmem_status != nullptr) atomicOr(gmem_status, kIndexOutOfRange);

  const u32 quad = static_cast<u32>(row) % 8, half = static_cast<u32>(row) / 8 % 2, t = lane % 4;
  const u32 tile_col = group * kWarpTiles + lane / 4;
  const bool valid = row < rows && tile_col < tiles_per_stripe;
  const u64 tile = row / kTileRows * tiles_per_stripe + tile_col;
  u16* smem_tile = smem_row + lane / 4 * kTilePitch;
  u32 pair[kPairs] = {};
  Header header = {};
  if (valid) {
    Lane share;
    load_lane(gmem_tiles + tile * kTileBytes, 4 * quad + t, share);
    header = load_header(gmem_header, lane);
    decode_lane(share, header.base, pair);
  }
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
#pragma unroll
    for (u32 c = 0; c < 2; ++c) {  // register 2c + half: columns 16i + 8c + 2t and the next
      reinterpret_cast<u32*>(smem_tile)[8 * i + 4 * c + t] = half ? pair[4 * i + 2 * c + 1] : pair[4 * i + 2 * c];
    }
  }
  __syncwarp();
  if (valid) {
    const u32 capacity = entry_capacity(escapes_bytes, header.wide);
    const u32 first = min(__ldg(gmem_offsets + tile), capacity), next = min(__ldg(gmem_offsets + tile + 1), capacity);
    const u32 entries = next > first ? min(next - first, kTileWeights) : 0;
    for (u32 e = t; e < entries; e += 4) {
      const u32 entry = load_entry(gmem_escapes, first + e, header.wide);
      // [9:8] step, [7:5] row mod 8, [4:3] column / 2 mod 4, [2] column / 8 mod 2, [1] row / 8, [0] column mod 2
      if ((entry >> 5 & 7) == quad && (entry >> 1 & 1) == half) {
        u16* weight = smem_tile + (entry >> 8 & 3) * 16 + (entry >> 2 & 1) * 8 + (entry >> 3 & 3) * 2 + (entry & 1);
        const u32 exponent = header.wide ? entry >> 16 & 0xFF : __ldg(gmem_header + (entry >> 10 & 63));
        *weight = with_exponent(*weight, exponent);
      }
    }
  }
  __syncwarp();
  Element* gmem = gmem_out + index * cols + static_cast<u64>(group) * kWarpCols;
  const u32 cols_left = min(cols - group * kWarpCols, kWarpCols);
  if (cols % 8 == 0) {
    for (u32 col = 8 * lane; col < cols_left; col += 8 * kWarp) {
      const u16* smem = smem_row + col / kTileCols * kTilePitch + col % kTileCols;
      store_once(reinterpret_cast<Eight*>(gmem + col), to_elements(*reinterpret_cast<const uint4*>(smem)));
    }
  } else {
    for (u32 col = lane; col < cols_left; col += kWarp) {
      store_once(gmem + col, to_element(smem_row[col / kTileCols * kTilePitch + col % kTileCols]));
    }
  }
}
