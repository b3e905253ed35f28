// Sums of family `lanes` with AVX-512: one register per output. Weights are BF16 pairs; FMA takes them apart.
#pragma once

#include <immintrin.h>

#include "isa/x86_lanes_pack.hpp"

namespace bitforbit {
namespace {

inline float add_lanes16(const float* lanes) {  // l and l + 8, then 4, 2, 1
  const __m256 a = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}

// The 64 weights of a group in natural order.
struct Group512 {
  __m512i w0, w1;
  void store(std::uint8_t* out) const {
    _mm512_storeu_si512(out, w0);
    _mm512_storeu_si512(out + 64, w1);
  }
};

// What both ways of summing share. V decodes, S sums two products of every lane.
template <class V, class S>
struct Lanes512 : S {
  static constexpr int kParts = 1;
  static constexpr bool kDirect = true;
  using Sum = __m512;

  static Sum load_sum(const float* p, int) { return _mm512_loadu_ps(p); }
  static void store_sum(float* p, int, Sum s) { _mm512_storeu_ps(p, s); }
  using Flush = FlushDenormals;

  static float add_lanes(const float* lanes) { return add_lanes16(lanes); }

  // From exponents rotated right by one bit, [7] exponent[0], [6:0] exponent[7:1], and [7] sign, [6:0] mantissa.
  static inline Group512 join(__m512i rotated, const std::uint8_t* sign_mantissa) {
    const __m512i sm = _mm512_loadu_si512(sign_mantissa), low7 = _mm512_set1_epi8(0x7f);
    const __m512i low = _mm512_ternarylogic_epi64(rotated, sm, low7, 0xd8);   // low7 ? sm : rotated
    const __m512i high = _mm512_ternarylogic_epi64(rotated, sm, low7, 0xe4);  // low7 ? rotated : sm
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }

  // Rows kRow to 15 of a tile. A recursion, as compilers keep arrays in registers only if the indices are constants.
  template <std::size_t kRow, class Groups>
  static inline __attribute__((always_inline)) void multiply_rows(Groups& groups, typename S::Inputs v0,
                                                                  typename S::Inputs v1, Sum* sum) {
    if constexpr (kRow < kBlockRows) {
      const Group512 w = groups.group(kRow);
      sum[kRow] = S::step(sum[kRow], S::weights(w.w0), v0);
      sum[kRow] = S::step(sum[kRow], S::weights(w.w1), v1);
      multiply_rows<kRow + 1>(groups, v0, v1, sum);
    }
  }

  // One token, tiles of 16 rows: a register per row. False: the exponents ran out.
  template <class Groups>
  static inline bool multiply_tiles(Groups& all, std::size_t tiles, const std::uint8_t* x, float* lanes) {
    Groups groups = all;  // in registers
    Sum sum[kBlockRows];
#pragma GCC unroll 16
    for (std::size_t row = 0; row < kBlockRows; ++row) sum[row] = _mm512_setzero_ps();
    for (std::size_t tile = 0; tile < tiles && !groups.ran_out(); ++tile, x += 2 * S::kInputBytes) {
      groups.prefetch_next_tail();
      multiply_rows<0>(groups, S::load_inputs(x, 0), S::load_inputs(x + S::kInputBytes, 0), sum);
      groups.advance(kBlockRows);
    }
#pragma GCC unroll 16
    for (std::size_t row = 0; row < kBlockRows; ++row) _mm512_storeu_ps(lanes + row * kLanes, sum[row]);
    all = groups;
    return !groups.ran_out();
  }
};

// FMA on FP32: per chunk 16 odd, then 16 even columns of the activations.
struct FmaSums512 {
  static constexpr std::size_t kInputBytes = 128, kRows = 4;
  static constexpr bool kBeside = true;
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
  static void pack(const LinearInput& in, std::uint8_t* packed) { pack_odd_even<FmaSums512>(in, packed); }
};

// Family `lanes_pairwise` of the same lanes.
template <class L>
struct Pairwise : L {
  struct Flush {
    Flush() {}
  };

  static float add_lanes(const float* lanes) {  // l and l + 8, then neighbours
    const __m256 a = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
    const __m256 b = _mm256_hadd_ps(a, a);  // (0 + 1), (2 + 3) of either half, twice
    const __m256 c = _mm256_hadd_ps(b, b);
    return _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(c), _mm256_extractf128_ps(c, 1)));
  }
};

}  // namespace
}  // namespace bitforbit
