// Products of up to 8 queries with tiles of 32 quantized tokens, by mma.m16n8k16: codes are fragment A, queries (or the
// weights of tokens) fragment B, so sums are transposed: rows are tokens (or channels), columns queries.
//
// Codes enter as they are: a mask and an OR give a pair of them in BF16, plus an offset that is taken off by a product
// with a constant. What stands before a code instead of its scale: for keys q' = q * scale, for values p' = p * scale.
// p' is rounded to BF16, as weights are anyway; q' is two BF16 numbers, as an error of a score is one of the weight's
// exponent. The zero of a group is moved to the middle code ("center") and multiplied apart; so a rounding error counts
// times the distance from the middle.
//
//   q.k = sum of q' (code - center) + sum of q (zero + center scale), the same for values.
//
// Lane 4q + t throughout. Within a step of 16 channels lane t has channels 4t to 4t + 3, as pairs (4t, 4t + 1) and
// (4t + 2, 4t + 3): the instruction does not care in which order channels are summed.
#pragma once
#include "bf16x2.cuh"
#include "kv.cuh"
#include "mma.cuh"

constexpr u32 kQueries = 8;
constexpr u32 kSteps = kHead / 16;  // of a sum over channels; also tiles of 16 channels of the output

template <u32 kBits>
constexpr float kCenter = kBits == 2   ? 2
                          : kBits == 4 ? 8
                                       : 128;

// -(offset + center) in BF16, twice: of a word's first pair of codes, of its second one. None for 8 bits.
template <u32 kBits>
constexpr u32 kFirstOffset = kBits == 2 ? 0xC302C302u : 0xC308C308u;  // -130, -136
template <u32 kBits>
constexpr u32 kSecondOffset = kBits == 2 ? 0xC208C208u : 0xC308C308u;  // -34, -136

// 8 bits at [7:0] and [23:16], minus 128, which BF16 holds exactly: 128 + code[6:0], and -256 or -128 by code[7].
__device__ __forceinline__ u32 whole_codes(u32 word) {
  return add_pairs(mask_or(word, 0x007F007F, 0x43004300), (word & 0x00800080) ^ 0xC380C380);
}

// The pairs at the low end of a word, plus offsets (8 bits: minus the center). 128 has its last bit of 1 at [0], 32 at
// [2].
template <u32 kBits>
__device__ __forceinline__ u32 first_codes(u32 word) {
  if constexpr (kBits == 2) return mask_or(word, 0x00030003, 0x43004300);
  if constexpr (kBits == 4) return mask_or(word, 0x000F000F, 0x43004300);
  return whole_codes(word);
}

template <u32 kBits>
__device__ __forceinline__ u32 second_codes(u32 word) {
  if constexpr (kBits == 2) return mask_or(word, 0x000C000C, 0x42004200);
  if constexpr (kBits == 4) return mask_or(word >> 4, 0x000F000F, 0x43004300);
  return whole_codes(word >> 8);
}

// Rows q from one word, rows q + 8 from another.
template <u32 kBits>
__device__ __forceinline__ uint4 code_rows(u32 upper, u32 lower) {
  return make_uint4(first_codes<kBits>(upper), first_codes<kBits>(lower), second_codes<kBits>(upper),
                    second_codes<kBits>(lower));
}

// Takes the offsets off: they are multiplied by the same B.
template <u32 kBits>
__device__ __forceinline__ void add_offsets(float (&sum)[4], u32 b0, u32 b1) {
  if constexpr (kBits == 8) return;
  mma_bf16(sum, make_uint4(kFirstOffset<kBits>, kFirstOffset<kBits>, kSecondOffset<kBits>, kSecondOffset<kBits>), b0,
           b1);
}

// kCount words, on a multiple of their size.
template <u32 kCount>
__device__ __forceinline__ void load_words(const u32* gmem, u32 (&word)[kCount]) {
  if constexpr (kCount == 4) {
    const uint4 raw = load_once(reinterpret_cast<const uint4*>(gmem));
    word[0] = raw.x, word[1] = raw.y, word[2] = raw.z, word[3] = raw.w;
  } else if constexpr (kCount == 2) {
    const uint2 raw = load_once(reinterpret_cast<const uint2*>(gmem));
    word[0] = raw.x, word[1] = raw.y;
  } else {
    word[0] = load_once(gmem);
  }
}

// --- keys ------------------------------------------------------------------------------------------------------------

// Query q: its channels of all steps.
struct Query {
  u32 pair[kSteps][2];
};

// q', of which `high` is the nearest BF16 and `rest` what that leaves, rounded: 2^-17 of q' is lost at most.
struct ScaledQuery {
  Query high, rest;
};

using Scores = float[2][4];  // [u]: tokens 4q + 2u, 4q + 2u + 1 of a tile; queries 2t, 2t + 1 of each

constexpr u32 kWarpTokens = 128, kWarpTiles = kWarpTokens / kTileTokens;
constexpr u32 kWarpGroups = kWarpTokens / kGroup, kGroupTiles = kGroup / kTileTokens;
static_assert(kWarpTokens % kGroup == 0, "a warp has whole groups of keys");

// Sums of q (zero + center scale) of the groups of kWarpTokens keys: lane 4g + t has those of group g mod kWarpGroups,
// queries 2t, 2t + 1. `gmem_params` are those of the first group.
__device__ __forceinline__ void key_biases(const Query& query, const u8* gmem_params, u32 lane, float (&bias)[2]) {
  const u16* gmem = reinterpret_cast<const u16*>(gmem_params + lane / 4 % kWarpGroups * kKeyGroupBytes) + lane % 4 * 4;
  float sum[4] = {};
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    const uint2 scale = __ldg(reinterpret_cast<const uint2*>(gmem + 16 * i));
    const uint2 zero = __ldg(reinterpret_cast<const uint2*>(gmem + kHead + 16 * i));
    mma_bf16(sum, make_uint4(zero.x, scale.x, zero.y, scale.y), query.pair[i][0], query.pair[i][1]);
  }
  bias[0] = sum[0] + kCenter<kKeyBits> * sum[2];
  bias[1] = sum[1] + kCenter<kKeyBits> * sum[3];
}

// q' of a group, and its product with the offsets, where all sums begin.
__device__ __forceinline__ void scale_query(const Query& query, const u8* gmem_params, u32 lane, ScaledQuery& scaled,
                                            float (&first)[4]) {
  const u16* gmem_scale = reinterpret_cast<const u16*>(gmem_params) + lane % 4 * 4;
  first[0] = first[1] = first[2] = first[3] = 0;
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    const uint2 raw = __ldg(reinterpret_cast<const uint2*>(gmem_scale + 16 * i));
    const u32 scale[2] = {raw.x, raw.y};
#pragma unroll
    for (u32 k = 0; k < 2; ++k) {
      const u32 high = multiply_pairs(query.pair[i][k], scale[k]);
      scaled.high.pair[i][k] = high;
      scaled.rest.pair[i][k] = lost_pairs(query.pair[i][k], scale[k], high);
    }
    add_offsets<kKeyBits>(first, scaled.high.pair[i][0], scaled.high.pair[i][1]);
    add_offsets<kKeyBits>(first, scaled.rest.pair[i][0], scaled.rest.pair[i][1]);
  }
}

// Sums of q' (code - center) of a tile.
__device__ __forceinline__ void multiply_keys(const ScaledQuery& scaled, const float (&first)[4], const u8* gmem_tile,
                                              u32 lane, Scores& score) {
  constexpr u32 kWords = kKeyBits / 2;  // of a step: tokens 4q to 4q + 3 of a lane's channels
  const u32* gmem = reinterpret_cast<const u32*>(gmem_tile) + (lane % 4 * 8 + lane / 4) * kWords;
#pragma unroll
  for (u32 e = 0; e < 4; ++e) score[0][e] = score[1][e] = first[e];
#pragma unroll
  for (u32 i = 0; i < kSteps; ++i) {
    u32 word[kWords];
    load_words(gmem + i * 32 * kWords, word);
#pragma unroll
    for (u32 u = 0; u < 2; ++u) {
      // A token has kKeyBits * 2 bits of each half of a word; 16 / (2 * kKeyBits) tokens share it.
      const u32 even = word[2 * u * kWords / 4] >> (2 * u * 2 * kKeyBits % 16);
      const u32 odd = word[(2 * u + 1) * kWords / 4] >> ((2 * u + 1) * 2 * kKeyBits % 16);
      const uint4 codes = code_rows<kKeyBits>(even, odd);
      mma_bf16(score[u], codes, scaled.high.pair[i][0], scaled.high.pair[i][1]);
      mma_bf16(score[u], codes, scaled.rest.pair[i][0], scaled.rest.pair[i][1]);
    }
  }
}

// --- values ----------------------------------------------------------------------------------------------------------

// Weights of a tile's tokens, fragment B: [j] has tokens 8t + j and 8t + 4 + j of query q.
using Weights = u32[4];

// A lane has kLaneChannels channels of each kSpan: kSpan s + kLaneChannels q + i. Tile of output m has those of
// i = 2 (m mod kSpanTiles) in rows q, the next ones in rows q + 8. All of a span have the same scale.
constexpr u32 kSpan = kValueGroup == 16 ? 16 : 32, kLaneChannels = kSpan / 8, kSpanTiles = kSpan / 16;
constexpr u32 kGroupSpans = kValueGroup / kSpan;
constexpr u32 kDotTiles = (kValueGroups + 7) / 8;

__device__ __forceinline__ u32 channel_of(u32 tile, u32 lane) {
  return tile / kSpanTiles * kSpan + kLaneChannels * (lane / 4) + 2 * (tile % kSpanTiles);
}

// Sums over tokens, of queries 2t, 2t + 1.
struct Output {
  float sum[kSteps][4];  // of p' times code plus offset: channels channel_of(tile, lane) and the next one

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (u32 m = 0; m < kSteps; ++m) sum[m][0] = sum[m][1] = sum[m][2] = sum[m][3] = 0;
  }
};

struct ValueTerms {
  float offset[kValueGroups][4];  // of p' times the offsets
  float dot[kDotTiles][4];        // of p times zeros (rows q) and scales (rows q + 8) of group 8 tile + q
};

// The params of tokens 8t to 8t + 7 as pairs (8t + j, 8t + 4 + j).
__device__ __forceinline__ void token_pairs(const u16* gmem, u32 lane, u32 (&pair)[4]) {
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(gmem + lane % 4 * 8));
  pair[0] = __byte_perm(raw.x, raw.z, 0x5410);
  pair[1] = __byte_perm(raw.x, raw.z, 0x7632);
  pair[2] = __byte_perm(raw.y, raw.w, 0x5410);
  pair[3] = __byte_perm(raw.y, raw.w, 0x7632);
}

// Adds a tile's tokens.
__device__ __forceinline__ void multiply_values(const Weights& weight, const u8* gmem_tile, const u8* gmem_params_tile,
                                                u32 lane, Output& out, ValueTerms& terms) {
  const u16* gmem_params = reinterpret_cast<const u16*>(gmem_params_tile);
#pragma unroll
  for (u32 d = 0; d < kDotTiles; ++d) {
    const u16* gmem_group = gmem_params + min(8 * d + lane / 4, kValueGroups - 1) * 2 * kTileTokens;
    u32 scale[4], zero[4];
    token_pairs(gmem_group, lane, scale);
    token_pairs(gmem_group + kTileTokens, lane, zero);
    mma_bf16(terms.dot[d], make_uint4(zero[0], scale[0], zero[1], scale[1]), weight[0], weight[1]);
    mma_bf16(terms.dot[d], make_uint4(zero[2], scale[2], zero[3], scale[3]), weight[2], weight[3]);
  }
#pragma unroll
  for (u32 g = 0; g < kValueGroups; ++g) {
    Weights scaled;
    token_pairs(gmem_params + g * 2 * kTileTokens, lane, scaled);
#pragma unroll
    for (u32 j = 0; j < 4; ++j) scaled[j] = multiply_pairs(weight[j], scaled[j]);
    add_offsets<kValueBits>(terms.offset[g], scaled[0], scaled[1]);
    add_offsets<kValueBits>(terms.offset[g], scaled[2], scaled[3]);
#pragma unroll
    for (u32 s = g * kGroupSpans; s < (g + 1) * kGroupSpans; ++s) {
      // 2 bits: a word has all of two channels; 4 bits: of one; 8 bits: half of one, another row has the other.
      constexpr u32 kWords = kValueBits == 2 ? kLaneChannels / 2 : kLaneChannels, kRows = kValueBits == 8 ? 2 : 1;
      constexpr u32 kRowWords = kValueBits == 2 ? kHead / 2 : kHead;
      u32 word[kRows][kWords];
#pragma unroll
      for (u32 r = 0; r < kRows; ++r) {
        load_words(reinterpret_cast<const u32*>(gmem_tile) + (lane % 4 * kRows + r) * kRowWords + s * (8 * kWords) +
                       lane / 4 * kWords,
                   word[r]);
      }
#pragma unroll
      for (u32 m = 0; m < kSpanTiles; ++m) {
#pragma unroll
        for (u32 u = 0; u < 2; ++u) {  // tokens of j = 2u and 2u + 1
          u32 upper, lower;
          if constexpr (kValueBits == 2) {
            upper = word[0][m] >> (4 * u), lower = word[0][m] >> (8 + 4 * u);
          } else {
            upper = word[kRows == 2 ? u : 0][2 * m], lower = word[kRows == 2 ? u : 0][2 * m + 1];
            if constexpr (kValueBits == 4) upper >>= 8 * u, lower >>= 8 * u;
          }
          mma_bf16(out.sum[s * kSpanTiles + m], code_rows<kValueBits>(upper, lower), scaled[2 * u], scaled[2 * u + 1]);
        }
      }
    }
  }
}

// Adds what belongs to all channels of a group.
__device__ __forceinline__ void add_terms(Output& out, const ValueTerms& terms, u32 lane) {
#pragma unroll
  for (u32 g = 0; g < kValueGroups; ++g) {
    const float (&dot)[4] = terms.dot[g / 8];
    const int source = static_cast<int>(4 * (g % 8) + lane % 4);
    const float term[2] = {__shfl_sync(kAllLanes, dot[0] + kCenter<kValueBits> * dot[2], source),
                           __shfl_sync(kAllLanes, dot[1] + kCenter<kValueBits> * dot[3], source)};
#pragma unroll
    for (u32 m = g * kValueGroup / 16; m < (g + 1) * kValueGroup / 16; ++m) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) {
        out.sum[m][e] += (kValueBits == 8 ? 0.0f : terms.offset[g][e]) + term[e % 2];
      }
    }
  }
}
