// Attention of some queries over a quantized cache: partial results of a row's items, which kv_merge.cu joins.
//
// An item is a segment (those of its 512 tokens whose keys and values are quantized both), or up to 512 of the other
// tokens. A block has an item of a row and head of the keys, with 8 queries; each of its warps has a quarter of the
// item's tokens. Sums are those of kv_products.cuh; exponents are taken to base 2. The order of all sums is that of
// the row's own tokens, so results do not depend on other rows, padding, other queries or the launch.
//
// A warp's part of a segment is read straight into registers, 128 bytes or more at a time, after all of it has been
// asked for from L2. See kv.cuh for the macros; BITFORBIT_BLOCKS is for measurements.
#include "kv_exact.cuh"

constexpr u32 kWarps = 4, kThreads = kWarps * kWarp;
constexpr u32 kItemTiles = kWarps * kWarpTiles;
// Of a multiprocessor, for which the compiler leaves registers.
#ifndef BITFORBIT_BLOCKS
#define BITFORBIT_BLOCKS (BITFORBIT_HEAD > 128 ? 2 : BITFORBIT_HEAD > 64 ? 3 : 4)
#endif
constexpr u32 kPitch = kHead + 1;  // of a query's sums in shared memory
constexpr float kLog2E = 1.44269504088896341f;
static_assert(kWarps * kWarpTokens == kSegmentTokens);

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000); }

// From products to exponents of 2.
struct Rules {
  float scaling, softcap;      // 0: none
  const u8* const* smem_seen;  // of each query, by the row's tokens; 0: all are seen

  // All of a lane's products of a tile; -infinity for tokens that do not count or are not seen.
  __device__ __forceinline__ void apply(Scores& score, const float (&bias)[2], const Tile& tile, u32 lane) const {
    const float factor = scaling * (softcap == 0 ? kLog2E : 1);
    const u32 token = tile.first + lane / 4 * 4;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) score[i / 4][i % 4] = score[i / 4][i % 4] * factor + bias[i % 2] * factor;
    if (softcap != 0) cap(score);
    if (!tile.whole()) cut(score, tile, token);
    if (smem_seen != nullptr) hide(score, tile, token, lane);
  }

  // softcap tanh(x / softcap), where tanh(y) = 1 - 2 / (e^2y + 1).
  __device__ __forceinline__ void cap(Scores& score) const {
    const float inverse = 2 * kLog2E / softcap;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      float& x = score[i / 4][i % 4];
      x = softcap * kLog2E * (1 - 2 * reciprocal(power_of_2(x * inverse) + 1));
    }
  }

  __device__ __forceinline__ void cut(Scores& score, const Tile& tile, u32 token) const {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      if (!tile.has(token + i / 2)) score[i / 4][i % 4] = minus_infinity();
    }
  }

  __device__ __forceinline__ void hide(Scores& score, const Tile& tile, u32 token, u32 lane) const {
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
      if (tile.has(token + i / 2) && smem_seen[lane % 4 * 2 + i % 2][token + i / 2] == 0) {
        score[i / 4][i % 4] = minus_infinity();
      }
    }
  }
};

// Largest exponent and sum of weights, of queries 2t, 2t + 1; the sum is this lane's alone until add_lanes().
struct Norm {
  float largest[2] = {minus_infinity(), minus_infinity()};
  float sum[2] = {0, 0};

  // What exponents are counted from.
  __device__ __forceinline__ float base(u32 query) const {
    return largest[query] == minus_infinity() ? 0 : largest[query];
  }

  __device__ __forceinline__ void take(const Scores& score) {
#pragma unroll
    for (u32 u = 0; u < 2; ++u) {
#pragma unroll
      for (u32 e = 0; e < 4; ++e) largest[e % 2] = fmaxf(largest[e % 2], score[u][e]);
    }
  }

  __device__ __forceinline__ void largest_of_lanes() {
#pragma unroll
    for (int bits = 4; bits <= 16; bits *= 2) {
#pragma unroll
      for (u32 i = 0; i < 2; ++i) largest[i] = fmaxf(largest[i], __shfl_xor_sync(kAllLanes, largest[i], bits));
    }
  }

  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int bits = 4; bits <= 16; bits *= 2) {
#pragma unroll
      for (u32 i = 0; i < 2; ++i) sum[i] += __shfl_xor_sync(kAllLanes, sum[i], bits);
    }
  }

  // Weights of a tile's tokens, rounded to BF16; the sum is that of the rounded ones.
  __device__ __forceinline__ void weigh(const Scores& score, Weights& weight) {
#pragma unroll
    for (u32 j = 0; j < 4; ++j) {
      const u32 pair =
          to_pair(power_of_2(score[j / 2][j % 2 * 2] - base(0)), power_of_2(score[j / 2][j % 2 * 2 + 1] - base(1)));
      sum[0] += low_of(pair);
      sum[1] += high_of(pair);
      weight[j] = transpose(pair);
    }
  }
};

__device__ __forceinline__ void prefetch_lines(const u8* gmem, u32 bytes, u32 lane) {
  for (u32 at = 128 * lane; at < bytes; at += 128 * kWarp) prefetch(gmem + at);
}

// Tokens [first, first + kWarpTokens) of a segment, as far as they are among its first `tokens`.
__device__ __forceinline__ void attend_segment(const Query& query, const Rules& rules, const u8* gmem_record,
                                               u32 segment_token, u32 first, u32 tokens, u32 lane, Norm& norm,
                                               Output& out) {
  const u32 tile = first / kTileTokens;
  const u8* gmem_key_codes = gmem_record + tile * kKeyTileBytes;
  const u8* gmem_key_params = gmem_record + kKeyParams + first / kGroup * kKeyGroupBytes;
  const u8* gmem_value_codes = gmem_record + kValueCodes + tile * kValueTileBytes;
  const u8* gmem_value_params = gmem_record + kValueParams + tile * kValueParamsTileBytes;
  prefetch_lines(gmem_key_params, kWarpGroups * kKeyGroupBytes, lane);
  prefetch_lines(gmem_key_codes, kWarpTiles * kKeyTileBytes, lane);
  prefetch_lines(gmem_value_params, kWarpTiles * kValueParamsTileBytes, lane);
  prefetch_lines(gmem_value_codes, kWarpTiles * kValueTileBytes, lane);

  float biases[2];
  key_biases(query, gmem_key_params, lane, biases);
  Scores score[kWarpTiles];
  ScaledQuery scaled;
  float offset[4], bias[2];
#pragma unroll
  for (u32 i = 0; i < kWarpTiles; ++i) {
    if (i % kGroupTiles == 0) {
      scale_query(query, gmem_key_params + i / kGroupTiles * kKeyGroupBytes, lane, scaled, offset);
#pragma unroll
      for (u32 e = 0; e < 2; ++e) {
        bias[e] = __shfl_sync(kAllLanes, biases[e], static_cast<int>(4 * (i / kGroupTiles) + lane % 4));
      }
    }
    multiply_keys(scaled, offset, gmem_key_codes + i * kKeyTileBytes, lane, score[i]);
    const u32 begin = segment_token + first + i * kTileTokens;
    rules.apply(score[i], bias, {begin, begin, segment_token + tokens}, lane);
    norm.take(score[i]);
  }
  norm.largest_of_lanes();

  Weights weight[kWarpTiles];
#pragma unroll
  for (u32 i = 0; i < kWarpTiles; ++i) norm.weigh(score[i], weight[i]);
  ValueTerms terms = {};
  out.clear();
#pragma unroll
  for (u32 i = 0; i < kWarpTiles; ++i) {
    if (first + i * kTileTokens >= tokens) break;
    multiply_values(weight[i], gmem_value_codes + i * kValueTileBytes, gmem_value_params + i * kValueParamsTileBytes,
                    lane, out, terms);
  }
  add_terms(out, terms, lane);
}

// What an item's other tokens need: their keys may be quantized.
struct Rest {
  u8* const* gmem_segments;
  const u16 *gmem_window_k, *gmem_window_v, *gmem_sink_k, *gmem_sink_v;
  u32 start, capacity;
  u32 row_head, tokens, sink, keys_quantized, values_quantized;
};

__device__ __forceinline__ void attend_rest(const Query& query, const Rules& rules, const Rest& rest, u32 number,
                                            u32 lane, Norm& norm, Output& out) {
  const u32 before_tiles = sink_tiles(rest.tokens, rest.sink);
  const bool sinking = number < before_tiles;
  // Of the tokens from `sink` on.
  const u32 token = sinking ? 0 : (rest.values_quantized / kTileTokens + number - before_tiles) * kTileTokens;
  const Tile tile = sinking ? Tile{number * kTileTokens, 0, min(rest.sink, rest.tokens)}
                            : Tile{rest.sink + token, rest.sink + rest.values_quantized, rest.tokens};
  const u32 place = sinking ? tile.first : (rest.start + tile.first) % rest.capacity;
  const u32 capacity = sinking ? rest.sink : rest.capacity;
  Scores score;
  float bias[2] = {0, 0};
  if (!sinking && token < rest.keys_quantized) {
    const u32 in_segment = token % kSegmentTokens, group = in_segment / kGroup;
    const u8* gmem_record = record_of(rest.gmem_segments, token / kSegmentTokens, rest.row_head);
    const u8* gmem_params = gmem_record + kKeyParams;
    ScaledQuery scaled;
    float offset[4], biases[2];
    key_biases(query, gmem_params + group / kWarpGroups * kWarpGroups * kKeyGroupBytes, lane, biases);
    scale_query(query, gmem_params + group * kKeyGroupBytes, lane, scaled, offset);
#pragma unroll
    for (u32 e = 0; e < 2; ++e) {
      bias[e] = __shfl_sync(kAllLanes, biases[e], static_cast<int>(4 * (group % kWarpGroups) + lane % 4));
    }
    multiply_keys(scaled, offset, gmem_record + in_segment / kTileTokens * kKeyTileBytes, lane, score);
  } else {
    multiply_exact_keys(query, {sinking ? rest.gmem_sink_k : rest.gmem_window_k, place, capacity}, tile, lane, score);
  }
  rules.apply(score, bias, tile, lane);

  const float before[2] = {norm.largest[0], norm.largest[1]};
  norm.take(score);
  norm.largest_of_lanes();
  float rescale[2];
#pragma unroll
  for (u32 e = 0; e < 2; ++e) {
    rescale[e] = power_of_2(before[e] - norm.base(e));  // 0 where nothing was seen before
    norm.sum[e] *= rescale[e];
  }
#pragma unroll
  for (u32 m = 0; m < kSteps; ++m) {
#pragma unroll
    for (u32 e = 0; e < 4; ++e) out.sum[m][e] *= rescale[e % 2];
  }
  Weights weight;
  norm.weigh(score, weight);
  multiply_exact_values(weight, {sinking ? rest.gmem_sink_v : rest.gmem_window_v, place, capacity}, tile, lane, out);
}

// The warps' parts, put together in their order: sums [kQueries][kHead] and, per query, largest exponent and sum of
// weights.
__device__ __forceinline__ void store_item(const Norm& norm, const Output& out, u32 queries, float* gmem_sums,
                                           float* gmem_norms) {
  SHARED(float, smem_sums, kWarps * kQueries * kPitch);
  SHARED(float, smem_largest, kWarps* kQueries);
  SHARED(float, smem_weights, kWarps* kQueries);
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (u32 e = 0; e < 2; ++e) {
    const u32 query = warp * kQueries + lane % 4 * 2 + e;
    if (lane < 4) {
      smem_largest[query] = norm.largest[e];
      smem_weights[query] = norm.sum[e];
    }
#pragma unroll
    for (u32 m = 0; m < kSteps; ++m) {
      float* smem = smem_sums + query * kPitch + channel_of(m, lane);
      smem[0] = out.sum[m][e];
      smem[1] = out.sum[m][2 + e];
    }
  }
  __syncthreads();
  for (u32 i = threadIdx.x; i < queries * kHead; i += kThreads) {
    const u32 query = i / kHead, channel = i % kHead;
    float largest = smem_largest[query];
    for (u32 w = 1; w < kWarps; ++w) largest = fmaxf(largest, smem_largest[w * kQueries + query]);
    const float base = largest == minus_infinity() ? 0 : largest;
    float sum = 0, weights = 0;
#pragma unroll
    for (u32 w = 0; w < kWarps; ++w) {
      const float factor = power_of_2(smem_largest[w * kQueries + query] - base);
      sum += factor * smem_sums[(w * kQueries + query) * kPitch + channel];
      weights += factor * smem_weights[w * kQueries + query];
    }
    gmem_sums[i] = sum;
    if (channel == 0) {
      gmem_norms[2 * query] = largest;
      gmem_norms[2 * query + 1] = weights;
    }
  }
}

// Block (group, row * heads + head, item), items that are no segments first, as they take long: queries 8 (first_group
// + group) and up of those of a head of the keys, of which there are queries_per_head * query_rows. Items below
// `segments` are segments. The quantized part was made of the first `slots` slots, `visible` are seen; with a counter
// it says how many `slots` are, and as many more are seen. Strides are in elements.
extern "C" __global__ void __launch_bounds__(kThreads, BITFORBIT_BLOCKS)
    kv_attend(u8* const* gmem_segments, const u16* gmem_window_k, const u16* gmem_window_v, const u16* gmem_sink_k,
              const u16* gmem_sink_v, const i32* gmem_start, u32 heads, u32 residual, u32 sink, u32 capacity, u32 slots,
              u32 visible, const i32* gmem_counter, const u16* gmem_q, u64 q_row, u64 q_head, u64 q_query,
              u32 queries_per_head, u32 query_rows, u32 first_group, float scaling, float softcap, const u8* gmem_mask,
              u64 mask_row, u64 mask_head, u64 mask_query, u32 segments, float* gmem_sums, float* gmem_norms) {
  const u32 warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const u32 group = blockIdx.x, row_head = blockIdx.y, exact_items = gridDim.z - segments;
  const u32 item = blockIdx.z < exact_items ? segments + blockIdx.z : blockIdx.z - exact_items;
  const u32 row = row_head / heads, head = row_head % heads;
  if (gmem_counter != nullptr) {
    visible = visible - slots + static_cast<u32>(*gmem_counter);
    slots = static_cast<u32>(*gmem_counter);
  }
  const u32 start = static_cast<u32>(gmem_start[row]);
  const u32 tokens = row_tokens(slots, start), seen_tokens = row_tokens(visible, start);
  const u32 values = values_quantized(tokens, sink, residual);

  const u32 segment_token = item * kSegmentTokens, first_tile = (item - segments) * kItemTiles;
  const u32 tiles = rest_tiles(seen_tokens, sink, values);
  if (item < segments ? segment_token >= values : first_tile >= tiles) return;

  // The head's queries are numbered head by head; those after the last are zeros.
  const u32 all_queries = queries_per_head * query_rows, first_query = (first_group + group) * kQueries;
  const auto head_of = [&](u32 number) { return static_cast<u64>(head * queries_per_head + number / query_rows); };
  SHARED(const u8*, smem_seen, kQueries);
  if (gmem_mask != nullptr && threadIdx.x < kQueries) {
    const u32 number = min(first_query + threadIdx.x, all_queries - 1);
    smem_seen[threadIdx.x] =
        gmem_mask + row * mask_row + head_of(number) * mask_head + number % query_rows * mask_query + start;
  }
  if (gmem_mask != nullptr) __syncthreads();
  Query query;
  {
    const u32 number = first_query + lane / 4;
    const u16* gmem = gmem_q + row * q_row + head_of(number) * q_head + number % query_rows * q_query + lane % 4 * 4;
#pragma unroll
    for (u32 i = 0; i < kSteps; ++i) {
      const uint2 pairs = number < all_queries ? *reinterpret_cast<const uint2*>(gmem + 16 * i) : make_uint2(0, 0);
      query.pair[i][0] = pairs.x, query.pair[i][1] = pairs.y;
    }
  }
  const u64 window = static_cast<u64>(row_head) * capacity * kHead, sinks = static_cast<u64>(row_head) * sink * kHead;
  const Rest rest = {gmem_segments,
                     gmem_window_k + window,
                     gmem_window_v + window,
                     gmem_sink_k + sinks,
                     gmem_sink_v + sinks,
                     start,
                     capacity,
                     row_head,
                     seen_tokens,
                     sink,
                     keys_quantized(tokens, sink, residual),
                     values};
  const Rules rules = {scaling, softcap, gmem_mask == nullptr ? nullptr : smem_seen};

  Norm norm;
  Output out;
  const u32 first_token = warp * kWarpTokens;
  if (item < segments && segment_token + first_token < values) {
    attend_segment(query, rules, record_of(gmem_segments, item, row_head), sink + segment_token, first_token,
                   min(values - segment_token, kSegmentTokens), lane, norm, out);
  } else {
    out.clear();
    const u32 end = item < segments ? 0 : min(first_tile + kItemTiles, tiles);
#pragma unroll 1
    for (u32 tile = first_tile + warp; tile < end; tile += kWarps) {
      attend_rest(query, rules, rest, tile, lane, norm, out);
    }
  }
  norm.add_lanes();
  const u64 place = (static_cast<u64>(item) * gridDim.y + row_head) * gridDim.x + group;
  store_item(norm, out, min(all_queries - first_query, kQueries), gmem_sums + place * kQueries * kHead,
             gmem_norms + place * kQueries * 2);
}
