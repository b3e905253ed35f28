// The product of a plain matrix, BF16 or FP16,, in the order of the fused kernels: what they are compared with on a
// GPU. As plain as can be: a warp has 16 rows, 8 tokens and all columns.
#include "fused.cuh"

constexpr u32 kMostTreeSplits = 32;

__device__ __forceinline__ u32 load_pair(const u16* gmem, u32 row, u32 rows, u32 col, u32 cols) {
  const u64 at = static_cast<u64>(row) * cols + col;
  const u32 low = row < rows && col < cols ? gmem[at] : 0, high = row < rows && col + 1 < cols ? gmem[at + 1] : 0;
  return low | high << 16;
}

// Adds this lane's sums of all splits up, into those of the first one.
__device__ __forceinline__ void add_tree(float4* smem_parts, u32 splits, Rules rules) {
  for (u32 left = splits, apart = 1; left > 1; left = (left + 1) / 2, apart *= 2) {
    for (u32 i = 0; i < left / 2; ++i) {
      const u32 to = rules.halves() ? i : 2 * apart * i, from = to + (rules.halves() ? (left + 1) / 2 : apart);
      const float4 a = smem_parts[to * kWarp], b = smem_parts[from * kWarp];
      const bool round = rules.rounds_sums();
      smem_parts[to * kWarp] = make_float4(rounded(a.x + b.x, round), rounded(a.y + b.y, round),
                                           rounded(a.z + b.z, round), rounded(a.w + b.w, round));
    }
  }
}

extern "C" __global__ void __launch_bounds__(kWarp)
    fused_plain(const u16* gmem_weights, const void* gmem_bias, const u16* gmem_x, u16* gmem_out, u32 rows, u32 cols,
                u32 tokens, u32 splits, u32 split_tiles, u32 order_rules, u32 bias_type) {
  SHARED(float4, smem_parts, kMostTreeSplits * kWarp);
  const Rules rules = {order_rules};
  const u32 lane = threadIdx.x, stripe = blockIdx.x, token = kMmaTokens * blockIdx.y;
  const u32 row = kTileRows * stripe + lane / 4, tiles_per_stripe = (cols - 1) / kTileCols + 1;
  float total[4];
  for (u32 i = 0; i < splits; ++i) {
    float sum[4] = {0, 0, 0, 0};
    const u32 split = rules.descending() ? splits - 1 - i : i;
    const u32 begin = split_begin(tiles_per_stripe, split, splits, split_tiles, rules) * kTileCols;
    const u32 end = split_begin(tiles_per_stripe, split + 1, splits, split_tiles, rules) * kTileCols;
    for (u32 col = begin; col < end; col += kMmaCols) {
      const u32 at = col + 2 * (lane % 4);
      const uint4 a = make_uint4(
          load_pair(gmem_weights, row, rows, at, cols), load_pair(gmem_weights, row + 8, rows, at, cols),
          load_pair(gmem_weights, row, rows, at + 8, cols), load_pair(gmem_weights, row + 8, rows, at + 8, cols));
      const u32 b0 = load_pair(gmem_x, token + lane / 4, tokens, at, cols);
      const u32 b1 = load_pair(gmem_x, token + lane / 4, tokens, at + 8, cols);
      if (rules.half_steps()) {
        multiply_half(sum, a.x, a.y, b0);
        multiply_half(sum, a.z, a.w, b1);
      } else {
        multiply_whole(sum, a, b0, b1);
      }
    }
    for (u32 e = 0; e < 4; ++e) {
      sum[e] = rounded(sum[e], splits > 1 && rules.rounds_partials());
      total[e] = i == 0 ? sum[e] : rounded(total[e] + sum[e], rules.rounds_sums());
    }
    if (rules.tree()) smem_parts[i * kWarp + lane] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  }
  if (rules.tree()) {
    add_tree(smem_parts + lane, splits, rules);
    const float4 sum = smem_parts[lane];
    total[0] = sum.x, total[1] = sum.y, total[2] = sum.z, total[3] = sum.w;
  }
  Matrix matrix = {};
  matrix.gmem_bias = gmem_bias, matrix.bias_type = bias_type, matrix.rows = rows;
  store_sums(total, load_bias(matrix, stripe, lane), gmem_out, stripe, rows, token, tokens, lane, rules);
}
