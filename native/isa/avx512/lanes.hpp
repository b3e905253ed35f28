// Sums of family `lanes` with AVX-512: one register per output. Weights are BF16 pairs; FMA takes them apart.
#pragma once

#include <immintrin.h>

#include "isa/x86_lanes_pack.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline float add_lanes16(const float* lanes) {  // l and l + 8, then 4, 2, 1
  const __m256 a = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// The 64 weights of one group in natural order: low and high words of the planes are merged without further masks.
inline void join_bf16(__m512i e, __m512i sign_mantissa, __m512i& w0, __m512i& w1) {
  const __m512i low = _mm512_ternarylogic_epi64(_mm512_set1_epi8(0x7f), sign_mantissa, _mm512_slli_epi16(e, 7), 0xca);
  const __m512i high =
      _mm512_ternarylogic_epi64(_mm512_set1_epi8(static_cast<char>(0x80)), sign_mantissa, _mm512_srli_epi16(e, 1), 0xca);
  w0 = _mm512_unpacklo_epi8(low, high);
  w1 = _mm512_unpackhi_epi8(low, high);
}

// What both ways of summing share. V decodes, S sums two products of every lane.
template <class V, class S>
struct Lanes512 : S {
  static constexpr int kParts = 1;
  static constexpr bool kDirect = true;
  using Sum = __m512;

  static Sum load_sum(const float* p, int) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, int, Sum s) { _mm512_storeu_ps(p, s); }
  static float add_lanes(const float* lanes) { return add_lanes16(lanes); }

  static inline void decode(__m512i table, const std::uint8_t* digits, const std::uint8_t* sign_mantissa,
                            const std::uint8_t* exponents2, std::size_t& used, __m512i& w0, __m512i& w1) {
    const __m512i d = V::unpack2(digits);
    const std::uint64_t threes = V::equal_mask(d, 3);
    const __m512i e = V::expand(V::lookup(table, d), threes, exponents2 + used);
    used += static_cast<std::size_t>(__builtin_popcountll(threes));
    join_bf16(e, _mm512_loadu_si512(sign_mantissa), w0, w1);
  }
  static inline void decode_group(__m512i table, const std::uint8_t* digits, const std::uint8_t* sign_mantissa,
                                  const std::uint8_t* exponents2, std::size_t& used, std::uint8_t* out) {
    __m512i w0, w1;
    decode(table, digits, sign_mantissa, exponents2, used, w0, w1);
    _mm512_storeu_si512(out, w0);
    _mm512_storeu_si512(out + 64, w1);
  }

  // One token, tiles of 16 rows: a register per row. Returns the exponents used, more than n2 if they ran out.
  static inline std::size_t multiply_tiles(__m512i table, const DecodeBlock& b, std::size_t tiles,
                                           const std::uint8_t* x, float* lanes) {
    const std::uint8_t *digits = b.digits, *sign_mantissa = b.planes[0], *exponents2 = b.exponents2;
    std::size_t used = 0;
    Sum sum[kBlockRows];
    for (auto& s : sum) s = _mm512_setzero_ps();
    for (std::size_t tile = 0; tile < tiles; ++tile) {
      if (used > b.n2) return used;  // bounds the reads of exponents2: at most a tile past n2, within its slack
      const typename S::Inputs v0 = S::load_inputs(x, 0), v1 = S::load_inputs(x + S::kInputBytes, 0);
#pragma GCC unroll 16
      for (std::size_t row = 0; row < kBlockRows; ++row) {
        __m512i w0, w1;
        _mm_prefetch(sign_mantissa + 64 * row + kAhead, _MM_HINT_T0);
        if (row % 4 == 0) _mm_prefetch(digits + 16 * row + kAhead / 4, _MM_HINT_T0);
        decode(table, digits + 16 * row, sign_mantissa + 64 * row, exponents2, used, w0, w1);
        sum[row] = S::step(sum[row], S::weights(w0), v0);
        sum[row] = S::step(sum[row], S::weights(w1), v1);
      }
      digits += 16 * kBlockRows, sign_mantissa += 64 * kBlockRows, x += 2 * S::kInputBytes;
    }
    for (std::size_t row = 0; row < kBlockRows; ++row) _mm512_storeu_ps(lanes + row * kBlockRows, sum[row]);
    return used;
  }
  static constexpr std::size_t kAhead = 4096;  // bytes of sign_mantissa that are asked for in advance
};

// FMA on FP32: per chunk 16 odd, then 16 even columns of the activations.
struct FmaSums512 {
  static constexpr std::size_t kInputBytes = 128, kMostTokens = 4, kRows = 4;
  struct Weights {
    __m512 odd, even;
  };
  using Inputs = Weights;

  static Weights weights(__m512i w) {
    return {_mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000)))),
            _mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
  }
  static Weights load_weights(const std::uint8_t* p, int) { return weights(_mm512_loadu_si512(p)); }
  static Inputs load_inputs(const std::uint8_t* p, int) { return {_mm512_load_ps(p), _mm512_load_ps(p + 64)}; }
  static __m512 step(__m512 sum, Weights w, Inputs x) {
    return _mm512_fmadd_ps(w.even, x.even, _mm512_fmadd_ps(w.odd, x.odd, sum));
  }
  static void pack(const LinearInput& in, std::uint8_t* packed) { pack_odd_even(in, packed); }
};

}  // namespace
}  // namespace bitforbit
