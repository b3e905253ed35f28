// Products of up to 8 queries with tiles of 32 exact tokens, in the same places as those of kv_products.cuh.
#pragma once
#include "kv_products.cuh"

// Those of the row's tokens [begin, end) that are among the 32 from `first` on.
struct Tile {
  u32 first, begin, end;

  __device__ __forceinline__ bool whole() const { return begin <= first && first + kTileTokens <= end; }
  __device__ __forceinline__ bool has(u32 token) const { return token >= begin && token < end; }
};

// A row's and head's exact keys or values: a ring.
struct ExactTokens {
  const u16* gmem;
  u32 place, capacity;  // of the tile's token 0; of the ring, which a tile goes around once at most

  // Of token i of the tile, in elements.
  __device__ __forceinline__ u32 offset(u32 i) const {
    const u32 at = place + i;
    return (at < capacity ? at : at - capacity) * kHead;
  }
};

constexpr u32 kNowhere = ~0u;  // an offset

__device__ __forceinline__ void multiply_exact_keys(const Query& query, const ExactTokens& keys, const Tile& tile,
                                                    u32 lane, Scores& score) {
  u32 offset[4];
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    const u32 token = lane / 4 * 4 + i;
    offset[i] = tile.has(tile.first + token) ? keys.offset(token) + lane % 4 * 4 : kNowhere;
#pragma unroll
    for (u32 e = 0; e < 2; ++e) score[i / 2][i % 2 * 2 + e] = 0;
  }
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    uint2 key[4];
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      key[j] = offset[j] == kNowhere ? make_uint2(0, 0)
                                     : __ldg(reinterpret_cast<const uint2*>(keys.gmem + offset[j] + 16 * i));
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
  u32 offset[8];
#pragma unroll
  for (u32 i = 0; i < 8; ++i) {
    const u32 token = lane % 4 * 8 + i;
    offset[i] = tile.has(tile.first + token) ? values.offset(token) + lane / 4 * kLaneChannels : kNowhere;
  }
#pragma unroll
  for (u32 m = 0; m < kSteps; ++m) {
    u32 pair[8];  // channels of the tile's rows q and q + 8, of a token
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      const u32 channel = m / kSpanTiles * kSpan + 2 * (m % kSpanTiles);
      pair[i] = offset[i] == kNowhere ? 0 : __ldg(reinterpret_cast<const u32*>(values.gmem + offset[i] + channel));
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
