// The product of a BF16 matrix as it is, in the order of the fused kernels: what they are compared with on a GPU. As
// plain as can be: a warp has 16 rows, 8 tokens and all columns.
#include "fused.cuh"

__device__ __forceinline__ u32 load_pair(const u16* gmem, u32 row, u32 rows, u32 col, u32 cols) {
  const u64 at = static_cast<u64>(row) * cols + col;
  const u32 low = row < rows && col < cols ? gmem[at] : 0, high = row < rows && col + 1 < cols ? gmem[at + 1] : 0;
  return low | high << 16;
}

extern "C" __global__ void __launch_bounds__(kWarp)
    fused_plain(const u16* gmem_weights, const u16* gmem_bias, const u16* gmem_x, u16* gmem_out, u32 rows, u32 cols,
                u32 tokens, u32 splits) {
  const u32 lane = threadIdx.x, stripe = blockIdx.x, token = kMmaTokens * blockIdx.y;
  const u32 row = kTileRows * stripe + lane / 4, tiles_per_stripe = (cols - 1) / kTileCols + 1;
  float total[4];
  for (u32 split = 0; split < splits; ++split) {
    float sum[4] = {0, 0, 0, 0};
    const u32 end = split_begin(tiles_per_stripe, split + 1, splits) * kTileCols;
    for (u32 col = split_begin(tiles_per_stripe, split, splits) * kTileCols; col < end; col += kMmaCols) {
      const u32 at = col + 2 * (lane % 4);
      const uint4 a = make_uint4(
          load_pair(gmem_weights, row, rows, at, cols), load_pair(gmem_weights, row + 8, rows, at, cols),
          load_pair(gmem_weights, row, rows, at + 8, cols), load_pair(gmem_weights, row + 8, rows, at + 8, cols));
      mma_bf16(sum, a, load_pair(gmem_x, token + lane / 4, tokens, at, cols),
               load_pair(gmem_x, token + lane / 4, tokens, at + 8, cols));
    }
    for (u32 e = 0; e < 4; ++e) total[e] = split == 0 ? sum[e] : total[e] + sum[e];
  }
  store_sums(total, gmem_bias, gmem_out, stripe, rows, token, tokens, lane);
}
