// The layout of a quantized KV cache: bitforbit/kv/layout.py says where every bit lies and what the codes are,
// bitforbit/kv/spec.py which tokens of a row are quantized. Names as there.
//
// BITFORBIT_HEAD: channels of a head (D). BITFORBIT_K_BITS, BITFORBIT_V_BITS: 2, 4, 8. BITFORBIT_GROUP: tokens that
// share a scale in a channel of the keys. BITFORBIT_V_GROUP: channels that share a scale in a token of the values.
#pragma once
#include "portable.cuh"

constexpr u32 kHead = BITFORBIT_HEAD, kKeyBits = BITFORBIT_K_BITS, kValueBits = BITFORBIT_V_BITS;
constexpr u32 kGroup = BITFORBIT_GROUP, kValueGroup = BITFORBIT_V_GROUP;
constexpr u32 kTileTokens = 32, kSegmentTokens = 512, kSegmentTiles = kSegmentTokens / kTileTokens;
static_assert(kHead % 16 == 0 && kHead % kValueGroup == 0);

// A record, in bytes: key codes of 16 tiles, key params, value codes, value params.
constexpr u32 kKeyTileBytes = kTileTokens * kHead * kKeyBits / 8;
constexpr u32 kKeyGroupBytes = 4 * kHead;  // of a group of tokens: scales, then zeros
constexpr u32 kValueTileBytes = kTileTokens * kHead * kValueBits / 8;
constexpr u32 kValueGroups = kHead / kValueGroup;
constexpr u32 kValueParamsTileBytes = 4 * kTileTokens * kValueGroups;
constexpr u32 kKeyParams = kSegmentTiles * kKeyTileBytes;
constexpr u32 kValueCodes = kKeyParams + kSegmentTokens / kGroup * kKeyGroupBytes;
constexpr u32 kValueParams = kValueCodes + kSegmentTiles * kValueTileBytes;
constexpr u32 kRecordBytes = kValueParams + kSegmentTiles * kValueParamsTileBytes;

// Tokens of a row whose first slot is `start`, when the cache has so many slots; some rows may be empty.
__device__ __forceinline__ u32 row_tokens(u32 slots, u32 start) { return slots > start ? slots - start : 0; }

// Of a row's tokens from `sink` on, so many keys and so many values are quantized.
__device__ __forceinline__ u32 keys_quantized(u32 tokens, u32 sink, u32 residual) {
  return tokens > sink ? (tokens - sink) / residual * residual : 0;
}

__device__ __forceinline__ u32 values_quantized(u32 tokens, u32 sink, u32 residual) {
  return tokens > sink + residual ? tokens - sink - residual : 0;
}

// Of a row of which so many tokens are seen and so many values are quantized: tiles of the first `sink` tokens; tiles
// of all tokens whose values are exact, those of the sink first; items that these make.
__device__ __forceinline__ u32 sink_tiles(u32 tokens, u32 sink) {
  return (min(sink, tokens) + kTileTokens - 1) / kTileTokens;
}

__device__ __forceinline__ u32 rest_tiles(u32 tokens, u32 sink, u32 values) {
  if (tokens <= sink) return sink_tiles(tokens, sink);
  return sink_tiles(tokens, sink) + (tokens - sink + kTileTokens - 1) / kTileTokens - values / kTileTokens;
}

__device__ __forceinline__ u32 rest_items(u32 tokens, u32 sink, u32 values) {
  return (rest_tiles(tokens, sink, values) + kSegmentTiles - 1) / kSegmentTiles;
}

// The record of a row and head (row * heads + head) with a segment.
__device__ __forceinline__ u8* record_of(u8* const* gmem_segments, u32 segment, u32 row_head) {
  return gmem_segments[segment] + static_cast<u64>(row_head) * kRecordBytes;
}
