// The vector interface of products with packed keys and values (generic/kv_products.hpp): AVX-512.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace bitforbit {
namespace {

struct Kv512 {
  static constexpr std::size_t kWidth = 16;
  static constexpr int kMostQueries = 8, kMostSums = 16;
  using F = __m512;
  using I = __m512i;

  // 8 words of 2-bit codes twice, the second time moved down by 8 bits: the upper lanes then hold what 4-bit codes have
  // in 8 words of their own, tokens 2 and 3 of four (keys) or odd channels (values).
  static I spread(const std::uint8_t* words) {
    const I twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
    return _mm512_mask_srli_epi32(twice, 0xff00, twice, 8);
  }
  template <int kBits>
  static I key_words(const std::uint8_t* words, std::size_t pass) {
    if constexpr (kBits == 2) return spread(words);
    return _mm512_loadu_si512(words + 64 * pass);
  }
  template <int kBits>
  static I value_words(const std::uint8_t* words, std::size_t index) {
    if constexpr (kBits == 2) return spread(words + 32 * index);
    return _mm512_loadu_si512(words + 64 * index);
  }
  template <int kBits>
  static std::size_t channel(std::size_t index, std::size_t lane) {
    return 16 * index + (kBits == 2 ? 2 * (lane % 8) + lane / 8 : lane);
  }
  // Of two tokens per lane, in the order of the tile.
  template <int kBits>
  static void store_scores(float* scores, std::size_t pass, const F* sum) {
    if constexpr (kBits == 8) {
      _mm512_storeu_ps(scores + 16 * pass, sum[0]);
    } else {
      // [4] the register, [3:0] the lane.
      const I first = kBits == 4 ? _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
                                 : _mm512_setr_epi32(0, 16, 8, 24, 1, 17, 9, 25, 2, 18, 10, 26, 3, 19, 11, 27);
      const I second = _mm512_add_epi32(first, _mm512_set1_epi32(kBits == 4 ? 8 : 4));
      _mm512_storeu_ps(scores, _mm512_permutex2var_ps(sum[0], first, sum[1]));
      _mm512_storeu_ps(scores + 16, _mm512_permutex2var_ps(sum[0], second, sum[1]));
    }
  }
  template <int kBits>
  static F code(I x, int shift) {
    const I moved = _mm512_srli_epi32(x, static_cast<unsigned>(shift));
    return _mm512_cvtepi32_ps(_mm512_and_si512(moved, _mm512_set1_epi32((1 << kBits) - 1)));
  }
  static F broadcast(float x) { return _mm512_set1_ps(x); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
};

}  // namespace
}  // namespace bitforbit
