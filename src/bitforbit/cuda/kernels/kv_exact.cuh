// Products of up to 8 queries with tiles of 32 exact tokens, in the same places as those of kv_products.cuh.
#pragma once
#include "kv_products.cuh"

// A row's and head's exact tokens.
struct ExactTokens {
  const u16* gmem_window;
  const u16* gmem_sink;
  u32 start, sink, capacity;

  // Of a token of the row; the window holds some of them only.
  __device__ __forceinline__ const u16* at(u32 token) const {
    if (token < sink) return gmem_sink + static_cast<u64>(token) * kHead;
    return gmem_window + static_cast<u64>((start + token) % capacity) * kHead;
  }
};

// Tokens that count, of a tile whose token 0 is the row's `first`.
struct Tile {
  u32 first, begin, end;

  __device__ __forceinline__ bool has(u32 token) const { return token >= begin && token < end; }
};

__device__ __forceinline__ void multiply_exact_keys(const Query& query, const ExactTokens& keys, const Tile& tile,
                                                    u32 lane, Scores& score) {
  const u16* gmem[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    const u32 token = tile.first + lane / 4 * 4 + i;
    gmem[i] = tile.has(token) ? keys.at(token) + lane % 4 * 4 : nullptr;
#pragma unroll
    for (u32 e = 0; e < 2; ++e) score[i / 2][i % 2 * 2 + e] = 0;
  }
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    uint2 key[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      key[j] = gmem[j] == nullptr ? make_uint2(0, 0) : *reinterpret_cast<const uint2*>(gmem[j] + 16 * i);
    }
#pragma unroll
    for (u32 u = 0; u < 2; ++u) {
      mma_bf16(score[u], make_uint4(key[2 * u].x, key[2 * u + 1].x, key[2 * u].y, key[2 * u + 1].y), query.pair[i][0],
               query.pair[i][1]);
    }
  }
}

__device__ __forceinline__ void multiply_exact_values(const Weights& weight, const ExactTokens& values,
                                                      const Tile& tile, u32 lane, Output& out) {
  const u16* gmem[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    const u32 token = tile.first + lane % 4 * 8 + i;
    gmem[i] = tile.has(token) ? values.at(token) + lane / 4 * kLaneChannels : nullptr;
  }
#pragma unroll
  for (u32 m = 0; m < kSteps; ++m) {
    u32 pair[8];  // channels of the tile's rows q and q + 8, of a token
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      const u32 channel = m / kSpanTiles * kSpan + 2 * (m % kSpanTiles);
      pair[i] = gmem[i] == nullptr ? 0 : *reinterpret_cast<const u32*>(gmem[i] + channel);
    }
#pragma unroll
    for (u32 u = 0; u < 2; ++u) {
      const u32 j = 2 * u;
      mma_bf16(out.sum[m],
               make_uint4(__byte_perm(pair[j], pair[j + 4], 0x5410), __byte_perm(pair[j], pair[j + 4], 0x7632),
                          __byte_perm(pair[j + 1], pair[j + 5], 0x5410), __byte_perm(pair[j + 1], pair[j + 5], 0x7632)),
               weight[j], weight[j + 1]);
    }
  }
}
