// Products with packed keys and values in FP32, written once for every vector instruction set. Included by
// isa/*/kv.cpp with V, the vector interface (isa/*/kv.cpp). Every element is dequantized as the layout defines it, so
// these are the products with the dequantized cache; unpacking is shared by the query rows of a block.
//
// Keys: lanes are tokens. A register of words holds, per lane, four channels (m = 0 to 3) of two tokens (of one for 8
// bits); a pass is a register's worth of the tile's tokens. Values: lanes are channels, a register holds 8 tokens (4
// for 8 bits). V brings 2-bit words into the form of 4-bit ones: see key_words and value_words.
#pragma once

#include "generic/kv_floats.hpp"

namespace bitforbit {
namespace {

// Channels that are summed on their own before they are added to the others, as the tokens of a tile are: the error of
// a sum in FP32 grows with its length.
inline constexpr std::size_t kSumBlock = 32;

// Scales and zeros as FP32: of the tiles of a segment, the most there are of either.
inline std::size_t float_params_bytes(const KvRecord& r) {
  const std::size_t keys = 2 * r.head_dim, values = kKvTiles * 2 * kKvTile * (r.head_dim / r.v_group);
  return 4 * (keys > values ? keys : values);
}

template <class V, int kBits, int kQueries>
void score_tile(const KvRecord& r, const std::uint8_t* tile, const float* scale, const float* zero, const float* q,
                float* scores) {
  using F = typename V::F;
  constexpr std::size_t kTokens = kBits == 8 ? 1 : 2;  // of a lane
  constexpr std::size_t kPasses = kKvTile / kTokens / V::kWidth;
  constexpr std::size_t kQuadBytes = 4 * kKvTile * kBits / 8;
  for (std::size_t pass = 0; pass < kPasses; ++pass) {
    F total[kQueries][kTokens], sum[kQueries][kTokens];
    for (int i = 0; i < kQueries; ++i) {
      for (std::size_t e = 0; e < kTokens; ++e) total[i][e] = sum[i][e] = V::broadcast(0.0f);
    }
    const std::uint8_t* words = tile;
    for (std::size_t c = 0; c < r.head_dim;) {
      const std::size_t end = c + kSumBlock < r.head_dim ? c + kSumBlock : r.head_dim;
      for (; c < end; c += 4, words += kQuadBytes) {
        const typename V::I x = V::template key_words<kBits>(words, pass);
#pragma GCC unroll 4
        for (std::size_t m = 0; m < 4; ++m) {
          const F s = V::broadcast(scale[c + m]), z = V::broadcast(zero[c + m]);
#pragma GCC unroll 2
          for (std::size_t e = 0; e < kTokens; ++e) {
            const int shift = static_cast<int>(16 * (m % 2) + kBits * (m / 2) + 2 * kBits * e);
            const F key = V::add(z, V::mul(s, V::template code<kBits>(x, shift)));
#pragma GCC unroll 8
            for (int i = 0; i < kQueries; ++i) {
              sum[i][e] = V::fma(V::broadcast(q[static_cast<std::size_t>(i) * r.head_dim + c + m]), key, sum[i][e]);
            }
          }
        }
      }
      for (int i = 0; i < kQueries; ++i) {
        for (std::size_t e = 0; e < kTokens; ++e) {
          total[i][e] = V::add(total[i][e], sum[i][e]), sum[i][e] = V::broadcast(0.0f);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
      V::template store_scores<kBits>(scores + static_cast<std::size_t>(i) * kKvScores, pass, total[i]);
    }
  }
}

template <class V, int kBits, int kQueries>
void score_tiles(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count, const float* q,
                 float* params, float* scores) {
  const std::size_t per_group = r.group / kKvTile;
  float *scale = params, *zero = params + r.head_dim;
  for (std::size_t tile = first; tile < first + count; ++tile) {
    if ((tile - first) % per_group == 0) {
      widen(param_dtype(r), record + r.key_params + tile / per_group * r.key_group, 2 * r.head_dim, params);
    }
    score_tile<V, kBits, kQueries>(r, record + tile * r.key_tile, scale, zero, q, scores + (tile - first) * kKvTile);
  }
}

// Channel registers [first, first + kRegisters) of `out`, lanes as value_words leaves them.
template <class V, int kBits, std::size_t kQueries, std::size_t kRegisters>
void sum_registers(const KvRecord& r, const std::uint8_t* codes, const float* params, std::size_t tiles,
                   std::size_t first, const float* p, float* out) {
  using F = typename V::F;
  F total[kQueries][kRegisters];
  const float* param[kRegisters];
  for (std::size_t k = 0; k < kRegisters; ++k) {
    param[k] = params + (first + k) * V::kWidth / r.v_group * 2 * kKvTile;
    for (std::size_t m = 0; m < kQueries; ++m) total[m][k] = V::broadcast(0.0f);
  }
  constexpr std::size_t kTokens = kBits == 8 ? 4 : 8;  // of a register
  const std::size_t step = 4 * kTokens * r.head_dim * kBits / 32;
  for (std::size_t tile = 0; tile < tiles; ++tile, p += kKvTile) {
    F sum[kQueries][kRegisters];
    for (std::size_t m = 0; m < kQueries; ++m) {
      for (std::size_t k = 0; k < kRegisters; ++k) sum[m][k] = V::broadcast(0.0f);
    }
    for (std::size_t i = 0; i < kKvTile; i += kTokens, codes += step) {
      typename V::I x[kRegisters];
#pragma GCC unroll 4
      for (std::size_t k = 0; k < kRegisters; ++k) x[k] = V::template value_words<kBits>(codes, first + k);
#pragma GCC unroll 8
      for (std::size_t n = 0; n < kTokens; ++n) {
        // 8 bits: registers hold tokens 0, 1, 4, 5 or 2, 3, 6, 7 of eight.
        const std::size_t half = n / (kTokens / 2), low = n % (kTokens / 2);
        const std::size_t token = i / 8 * 8 + 4 * half + low + (kBits == 8 ? i % 8 / 2 : 0);
        const int shift = static_cast<int>(16 * half + kBits * low);
#pragma GCC unroll 4
        for (std::size_t k = 0; k < kRegisters; ++k) {
          const F s = V::broadcast(param[k][token]), z = V::broadcast(param[k][kKvTile + token]);
          const F value = V::add(z, V::mul(s, V::template code<kBits>(x[k], shift)));
#pragma GCC unroll 8
          for (std::size_t m = 0; m < kQueries; ++m) {
            sum[m][k] = V::fma(V::broadcast(p[m * kKvScores + token]), value, sum[m][k]);
          }
        }
      }
    }
    for (std::size_t k = 0; k < kRegisters; ++k) {
      param[k] += r.head_dim / r.v_group * 2 * kKvTile;
      for (std::size_t m = 0; m < kQueries; ++m) total[m][k] = V::add(total[m][k], sum[m][k]);
    }
  }
  for (std::size_t m = 0; m < kQueries; ++m) {
    for (std::size_t k = 0; k < kRegisters; ++k) {
      alignas(64) float lanes[V::kWidth];
      V::store(lanes, total[m][k]);
      for (std::size_t l = 0; l < V::kWidth; ++l) {
        out[m * r.head_dim + V::template channel<kBits>(first + k, l)] += lanes[l];
      }
    }
  }
}

template <class V, int kBits, int kQueries>
void sum_values(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p, float* params,
                float* out) {
  const std::size_t tiles = (count + kKvTile - 1) / kKvTile, registers = r.head_dim / V::kWidth;
  widen(param_dtype(r), record + r.value_params, tiles * r.value_params_tile / 2, params);
  const std::uint8_t* codes = record + r.value_codes;
  constexpr int kBlock = kQueries <= V::kMostSums / 2 ? 2 : 1;  // head dimensions are even numbers of registers, or
  for (std::size_t k = 0; k < registers; k += kBlock) {         // kBlock is 1
    if (kBlock == 2 && k + 1 < registers) {
      sum_registers<V, kBits, kQueries, kBlock>(r, codes, params, tiles, k, p, out);
    } else {
      sum_registers<V, kBits, kQueries, 1>(r, codes, params, tiles, k, p, out);
    }
  }
}

// Runs f(Count<n>, first) for blocks of n query rows, at most kMost.
template <int kQueries>
struct Count {
  static constexpr int value = kQueries;
};

template <int kMost, class F>
inline void over_queries(std::size_t count, F f) {
  std::size_t first = 0;
  if constexpr (kMost >= 8) {
    for (; count - first >= 8; first += 8) f(Count<8>{}, first);
  }
  if constexpr (kMost >= 4) {
    for (; count - first >= 4; first += 4) f(Count<4>{}, first);
  }
  for (; count - first >= 2; first += 2) f(Count<2>{}, first);
  for (; count - first >= 1; first += 1) f(Count<1>{}, first);
}

template <class V, int kBits>
void score_bits(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count, const KvQueries& q,
                float* scores) {
  over_queries<V::kMostQueries>(q.count, [&](auto queries, std::size_t m) {
    score_tiles<V, kBits, decltype(queries)::value>(r, record, first, count, q.q + m * r.head_dim,
                                                    reinterpret_cast<float*>(q.room), scores + m * kKvScores);
  });
}

template <class V>
void score_quantized(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count,
                     const KvQueries& q, float* scores) {
  switch (r.k_bits) {
    case 2: return score_bits<V, 2>(r, record, first, count, q, scores);
    case 4: return score_bits<V, 4>(r, record, first, count, q, scores);
    default: return score_bits<V, 8>(r, record, first, count, q, scores);
  }
}

template <class V, int kBits>
void sum_bits(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p, const KvQueries& q,
              float* out) {
  over_queries<V::kMostQueries>(q.count, [&](auto queries, std::size_t m) {
    sum_values<V, kBits, decltype(queries)::value>(r, record, count, p + m * kKvScores,
                                                   reinterpret_cast<float*>(q.room), out + m * r.head_dim);
  });
}

template <class V>
void sum_quantized(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p, const KvQueries& q,
                   float* out) {
  switch (r.v_bits) {
    case 2: return sum_bits<V, 2>(r, record, count, p, q, out);
    case 4: return sum_bits<V, 4>(r, record, count, p, q, out);
    default: return sum_bits<V, 8>(r, record, count, p, q, out);
  }
}

}  // namespace
}  // namespace bitforbit
