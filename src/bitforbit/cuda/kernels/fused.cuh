// What the kernels for products share (cuda/fused/order.py: the order of summation; cuda/fused/linear.py: the table).
#pragma once
#include "mma.cuh"
#include "tiles.cuh"

constexpr u32 kMmaTokens = 8, kMmaCols = 16;  // of one mma: its weights are 16 rows by 16 columns

// A matrix of a launch, as the table has it: 64 bytes. Rows of the matrices before it tell where its output begins.
struct Matrix {
  const u8* gmem_tiles;
  const u8* gmem_escapes;
  u64 escapes_bytes;
  const u32* gmem_offsets;
  const u8* gmem_header;
  const u16* gmem_bias;  // or nullptr
  u64 rows;
  u64 rows_before;
};
static_assert(sizeof(Matrix) == 64, "entries of the table");

// First tile of a split; that of the split after the last is the number of tiles.
__device__ __forceinline__ u32 split_begin(u32 tiles_per_stripe, u32 split, u32 splits) {
  return static_cast<u32>(static_cast<u64>(tiles_per_stripe) * split / splits);
}

// Puts a stripe's sums for 8 tokens to gmem_out [tokens, rows], with the bias of their rows.
__device__ __forceinline__ void store_sums(const float (&sum)[4], const u16* gmem_bias, u16* gmem_out, u32 stripe,
                                           u32 rows, u32 token, u32 tokens, u32 lane) {
#pragma unroll
  for (u32 e = 0; e < 4; ++e) {
    const u32 row = kTileRows * stripe + lane / 4 + 8 * (e / 2), at = token + 2 * (lane % 4) + e % 2;
    if (row >= rows || at >= tokens) continue;
    const float total = gmem_bias == nullptr ? sum[e] : sum[e] + from_bf16(__ldg(gmem_bias + row));
    gmem_out[static_cast<u64>(at) * rows + row] = to_bf16(total);
  }
}
