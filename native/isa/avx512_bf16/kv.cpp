// Quantized caches with AVX-512 BF16: codes enter the products as BF16 numbers, scales are folded into the other side.
//
// A code of at most 4 bits becomes 128 + code by setting its exponent, two elements at a time. Queries are multiplied
// by the scales of a group of keys and rounded to two BF16 numbers, probabilities by the scales of values to one. What
// the products have too much, 128 times the rounded sums, is subtracted from one sum per group, which also brings the
// zeros. There, exact in FP32, stands the middle code, so that the rounding error meets code - middle only. 8-bit codes
// take the FP32 way.
#include "isa/avx512/kv.hpp"

#include "generic/kv_exact.hpp"
#include "generic/kv_products.hpp"
#include "generic/kv_quantize.hpp"

namespace bitforbit {
namespace {

inline constexpr int kAtOnce = 4;            // query rows
inline constexpr std::size_t kAhead = 4096;  // bytes that are asked for before their turn

// Both 16-bit halves of every lane as BF16: 128 + the code at `shift`.
template <int kBits>
inline __m512bh codes(__m512i x, int shift) {
  constexpr int kMask = ((1 << kBits) - 1) * 0x10001, kMagic = 0x43004300;
  const __m512i moved = _mm512_srli_epi32(x, static_cast<unsigned>(shift));
  // moved & mask | magic
  return (__m512bh)_mm512_ternarylogic_epi32(moved, _mm512_set1_epi32(kMask), _mm512_set1_epi32(kMagic), 0xea);
}

template <int kBits>
inline constexpr float kMiddle = ((1 << kBits) - 1) / 2.0f;

// sum - (128 + middle) w, two numbers per lane. The factor has 9 bits, too many for BF16, so in two steps.
template <int kBits>
inline __m512 take_excess(__m512 sum, __m512bh w) {
  constexpr std::uint32_t kWhole = kBits == 4 ? 0xc307 : 0xc301, kHalf = 0xbf00;  // -135 or -129, -0.5
  sum = _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(static_cast<int>(kWhole * 0x10001u)));
  return _mm512_dpbf16_ps(sum, w, (__m512bh)_mm512_set1_epi32(static_cast<int>(kHalf * 0x10001u)));
}

// A folded query is the sum of two BF16 numbers. With one, 2-bit keys had up to 2.2 times the error of plain BF16
// attention and 4-bit ones 1.6 times; with two it is half of that error.
inline constexpr int kTerms = 2;

inline __m512 low_half(__m512bh x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256((__m512i)x)), 16));
}
inline __m512 high_half(__m512bh x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64((__m512i)x, 1)), 16));
}

inline __m512 load_params(const std::uint8_t* p, __mmask16 mask = 0xffff) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}

inline __m512bh pair_of(const std::uint32_t* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }

// Query rows times the scales of a group, pairs of channels [kQueries][kTerms][pairs]; and per query row what is to be
// added to the products.
template <int kBits, int kQueries>
void fold_queries(const KvRecord& r, const std::uint8_t* params, const float* q, std::size_t pairs,
                  std::uint32_t* folded, float* extra) {
  __m512 sum[kQueries];
  for (int m = 0; m < kQueries; ++m) sum[m] = _mm512_setzero_ps();
  const __m512 middle = _mm512_set1_ps(kMiddle<kBits>);
  for (std::size_t c = 0; c < r.head_dim; c += 32) {
    const __mmask16 second = c + 16 < r.head_dim ? 0xffff : 0;
    const std::uint8_t* zeros = params + 2 * r.head_dim;
    const __m512 s0 = load_params(params + 2 * c), s1 = load_params(params + 2 * c + 32, second);
    const __m512 z0 = _mm512_fmadd_ps(middle, s0, load_params(zeros + 2 * c));
    const __m512 z1 = _mm512_fmadd_ps(middle, s1, load_params(zeros + 2 * c + 32, second));
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
      const float* query = q + static_cast<std::size_t>(m) * r.head_dim + c;
      const __m512 q0 = _mm512_loadu_ps(query), q1 = _mm512_maskz_loadu_ps(second, query + 16);
      const __m512 w0 = _mm512_mul_ps(q0, s0), w1 = _mm512_mul_ps(q1, s1);
      const __m512bh w = _mm512_cvtne2ps_pbh(w1, w0);
      std::uint32_t* at = folded + static_cast<std::size_t>(m) * kTerms * pairs + c / 2;
      _mm512_storeu_si512(at, (__m512i)w);
      sum[m] = _mm512_fmadd_ps(q1, z1, _mm512_fmadd_ps(q0, z0, sum[m]));
      sum[m] = take_excess<kBits>(sum[m], w);
      const __m512bh rest = _mm512_cvtne2ps_pbh(_mm512_sub_ps(w1, high_half(w)), _mm512_sub_ps(w0, low_half(w)));
      _mm512_storeu_si512(at + pairs, (__m512i)rest);
      sum[m] = take_excess<kBits>(sum[m], rest);
    }
  }
  for (int m = 0; m < kQueries; ++m) extra[m] = _mm512_reduce_add_ps(sum[m]);
}

template <int kBits, int kQueries>
void score_tile_bf16(const KvRecord& r, const std::uint8_t* words, const std::uint32_t* folded, std::size_t pairs,
                     const float* extra, float* scores) {
  __m512 sum[kQueries][2][2];  // tokens of a lane, pairs of channels
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m) {
    sum[m][0][0] = sum[m][0][1] = sum[m][1][0] = sum[m][1][1] = _mm512_setzero_ps();
  }
  for (std::size_t quad = 0; quad < r.head_dim / 4; ++quad, words += 16 * kBits) {
    const __m512i x = Kv512::key_words<kBits>(words, 0);
    __builtin_prefetch(words + kAhead, 0, 2);
    const __m512bh first0 = codes<kBits>(x, 0), first1 = codes<kBits>(x, kBits);
    const __m512bh second0 = codes<kBits>(x, 2 * kBits), second1 = codes<kBits>(x, 3 * kBits);
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
#pragma GCC unroll 2
      for (int term = 0; term < kTerms; ++term) {
        const std::uint32_t* at = folded + static_cast<std::size_t>(m * kTerms + term) * pairs + 2 * quad;
        const __m512bh q0 = pair_of(at), q1 = pair_of(at + 1);
        sum[m][0][0] = _mm512_dpbf16_ps(sum[m][0][0], first0, q0);
        sum[m][0][1] = _mm512_dpbf16_ps(sum[m][0][1], first1, q1);
        sum[m][1][0] = _mm512_dpbf16_ps(sum[m][1][0], second0, q0);
        sum[m][1][1] = _mm512_dpbf16_ps(sum[m][1][1], second1, q1);
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kQueries; ++m) {
    const __m512 more = _mm512_set1_ps(extra[m]);
    const __m512 tokens[2] = {_mm512_add_ps(_mm512_add_ps(sum[m][0][0], sum[m][0][1]), more),
                              _mm512_add_ps(_mm512_add_ps(sum[m][1][0], sum[m][1][1]), more)};
    Kv512::store_scores<kBits>(scores + static_cast<std::size_t>(m) * kKvScores, 0, tokens);
  }
}

template <int kBits>
void score_bf16(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count, const KvQueries& q,
                float* scores) {
  const std::size_t per_group = r.group / kKvTile, pairs = (r.head_dim + 31) / 32 * 16;
  auto* folded = reinterpret_cast<std::uint32_t*>(q.room);
  over_queries<kAtOnce>(q.count, [&](auto queries, std::size_t m) {
    constexpr int kQueries = decltype(queries)::value;
    float extra[kQueries];
    for (std::size_t tile = first; tile < first + count; ++tile) {
      if ((tile - first) % per_group == 0) {
        fold_queries<kBits, kQueries>(r, record + r.key_params + tile / per_group * r.key_group, q.q + m * r.head_dim,
                                      pairs, folded, extra);
      }
      score_tile_bf16<kBits, kQueries>(r, record + tile * r.key_tile, folded, pairs, extra,
                                       scores + m * kKvScores + (tile - first) * kKvTile);
    }
  });
}

// Probabilities times scales, per group of channels pairs of tokens (8 t + j, 8 t + 4 + j) at [tile][4 t + j]:
// [groups][kQueries][16 tiles][16]. What is to be added to the channels of group g: extra[g][m].
template <int kBits, int kQueries>
void fold_probabilities(const KvRecord& r, const std::uint8_t* params, std::size_t tiles, const float* p,
                        std::uint32_t* folded, float* extra) {
  const std::size_t groups = r.head_dim / r.v_group;
  const __m512 middle = _mm512_set1_ps(kMiddle<kBits>);
  alignas(64) std::uint16_t order[32];
  for (std::uint16_t t = 0; t < 4; ++t) {
    for (std::uint16_t j = 0; j < 4; ++j) {
      order[8 * t + 2 * j] = static_cast<std::uint16_t>(8 * t + j);
      order[8 * t + 2 * j + 1] = static_cast<std::uint16_t>(8 * t + 4 + j);
    }
  }
  const __m512i pairs = _mm512_load_si512(order);
  for (std::size_t g = 0; g < groups; ++g) {
    __m512 sum[kQueries];
    for (int m = 0; m < kQueries; ++m) sum[m] = _mm512_setzero_ps();
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      const std::uint8_t* scales = params + tile * r.value_params_tile + 4 * kKvTile * g;
      const __m512 s0 = load_params(scales), s1 = load_params(scales + 32);
      const __m512 z0 = _mm512_fmadd_ps(middle, s0, load_params(scales + 64));
      const __m512 z1 = _mm512_fmadd_ps(middle, s1, load_params(scales + 96));
#pragma GCC unroll 4
      for (int m = 0; m < kQueries; ++m) {
        const float* at = p + static_cast<std::size_t>(m) * kKvScores + tile * kKvTile;
        const __m512 p0 = _mm512_loadu_ps(at), p1 = _mm512_loadu_ps(at + 16);
        const __m512bh w = _mm512_cvtne2ps_pbh(_mm512_mul_ps(p1, s1), _mm512_mul_ps(p0, s0));
        _mm512_storeu_si512(folded + ((g * kQueries + static_cast<std::size_t>(m)) * kKvTiles + tile) * 16,
                            _mm512_permutexvar_epi16(pairs, (__m512i)w));
        sum[m] = _mm512_fmadd_ps(p1, z1, _mm512_fmadd_ps(p0, z0, sum[m]));
        sum[m] = take_excess<kBits>(sum[m], w);
      }
    }
    for (int m = 0; m < kQueries; ++m) extra[g * kQueries + static_cast<std::size_t>(m)] = _mm512_reduce_add_ps(sum[m]);
  }
}

// kRegisters registers of 16 channels from register `first` on; kShared of them share a group.
template <int kBits, int kQueries, int kRegisters, int kShared>
void sum_registers_bf16(const KvRecord& r, const std::uint8_t* words, std::size_t tiles, std::size_t first,
                        const std::uint32_t* folded, const float* extra, float* out) {
  __m512 sum[kQueries][kRegisters];
  constexpr std::size_t kPerQuery = kKvTiles * 16;
  const std::uint32_t* weights[kRegisters / kShared];
#pragma GCC unroll 8
  for (int k = 0; k < kRegisters; ++k) {
    if (k % kShared == 0) {
      weights[k / kShared] = folded + 16 * (first + static_cast<std::size_t>(k)) / r.v_group * kQueries * kPerQuery;
    }
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) sum[m][k] = _mm512_setzero_ps();
  }
  const std::size_t step = r.head_dim * kBits;  // bytes of 8 tokens
  for (std::size_t t = 0; t < 16 * tiles; t += 4, words += step) {
    __m512i x[kRegisters];
#pragma GCC unroll 8
    for (int k = 0; k < kRegisters; ++k) {
      x[k] = Kv512::value_words<kBits>(words, first + static_cast<std::size_t>(k));
      if (16 * kBits * k % 64 == 0)
        __builtin_prefetch(words + 16 * kBits * (first + static_cast<std::size_t>(k)) + kAhead, 0, 2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 8
      for (int g = 0; g < kRegisters / kShared; ++g) {
        __m512bh code[kShared];
#pragma GCC unroll 4
        for (int k = 0; k < kShared; ++k) code[k] = codes<kBits>(x[g * kShared + k], j * kBits);
#pragma GCC unroll 4
        for (int m = 0; m < kQueries; ++m) {
          const __m512bh p =
              pair_of(weights[g] + static_cast<std::size_t>(m) * kPerQuery + t + static_cast<std::size_t>(j));
#pragma GCC unroll 4
          for (int k = 0; k < kShared; ++k) {
            sum[m][g * kShared + k] = _mm512_dpbf16_ps(sum[m][g * kShared + k], code[k], p);
          }
        }
      }
    }
  }
  const __m512i order = kBits == 2 ? _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15)
                                   : _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 8
  for (int k = 0; k < kRegisters; ++k) {
    const std::size_t c = 16 * (first + static_cast<std::size_t>(k));
#pragma GCC unroll 4
    for (int m = 0; m < kQueries; ++m) {
      float* at = out + static_cast<std::size_t>(m) * r.head_dim + c;
      const __m512 more = _mm512_set1_ps(extra[c / r.v_group * kQueries + static_cast<std::size_t>(m)]);
      const __m512 channels = _mm512_permutexvar_ps(order, sum[m][k]);
      _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_add_ps(channels, more)));
    }
  }
}

template <int kBits>
void sum_bf16(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p, const KvQueries& q,
              float* out) {
  const std::size_t tiles = (count + kKvTile - 1) / kKvTile, groups = r.head_dim / r.v_group;
  auto* extra = reinterpret_cast<float*>(q.room);  // [groups][queries], then the folded probabilities
  auto* folded = reinterpret_cast<std::uint32_t*>(q.room + 64 * ((groups * kAtOnce * 4 + 63) / 64));
  over_queries<kAtOnce>(q.count, [&](auto queries, std::size_t m) {
    constexpr int kQueries = decltype(queries)::value;
    constexpr int kRegisters = kQueries == 1 ? 8 : 4;
    fold_probabilities<kBits, kQueries>(r, record + r.value_params, tiles, p + m * kKvScores, folded, extra);
    const std::uint8_t* words = record + r.value_codes;
    float* sums = out + m * r.head_dim;
    std::size_t k = 0;
    for (; k + kRegisters <= r.head_dim / 16; k += kRegisters) {
      if (r.v_group % 64 == 0) {
        sum_registers_bf16<kBits, kQueries, kRegisters, 4>(r, words, tiles, k, folded, extra, sums);
      } else if (r.v_group == 32) {
        sum_registers_bf16<kBits, kQueries, kRegisters, 2>(r, words, tiles, k, folded, extra, sums);
      } else {
        sum_registers_bf16<kBits, kQueries, kRegisters, 1>(r, words, tiles, k, folded, extra, sums);
      }
    }
    for (; k < r.head_dim / 16; ++k) {
      sum_registers_bf16<kBits, kQueries, 1, 1>(r, words, tiles, k, folded, extra, sums);
    }
  });
}

std::size_t scratch_bytes(const KvRecord& r) {
  const std::size_t groups = r.head_dim / r.v_group;
  const std::size_t folded = 4 * (groups * kAtOnce * kKvTiles * 16 + 2 * kAtOnce * (r.head_dim + 16)) + 64;
  const std::size_t floats = float_params_bytes(r);
  return folded + 4 * groups * kAtOnce > floats ? folded + 4 * groups * kAtOnce : floats;
}

void score(const KvRecord& r, const std::uint8_t* record, std::size_t first, std::size_t count, const KvQueries& q,
           float* scores) {
  switch (r.k_bits) {
    case 2: return score_bf16<2>(r, record, first, count, q, scores);
    case 4: return score_bf16<4>(r, record, first, count, q, scores);
    default: return score_bits<Kv512, 8>(r, record, first, count, q, scores);
  }
}

void sum(const KvRecord& r, const std::uint8_t* record, std::size_t count, const float* p, const KvQueries& q,
         float* out) {
  switch (r.v_bits) {
    case 2: return sum_bf16<2>(r, record, count, p, q, out);
    case 4: return sum_bf16<4>(r, record, count, p, q, out);
    default: return sum_bits<Kv512, 8>(r, record, count, p, q, out);
  }
}

}  // namespace

const KvOps kKvAvx512Bf16 = {"avx512_bf16", false,       scratch_bytes, quantize_keys, quantize_values,
                             score,         score_exact, softmax,       sum,           sum_exact};
}  // namespace bitforbit
