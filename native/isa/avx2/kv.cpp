// Quantized caches with AVX2 and FMA.
#include <immintrin.h>

#include "generic/kv_exact.hpp"
#include "generic/kv_products.hpp"
#include "generic/kv_quantize.hpp"

namespace bitforbit {
namespace {

struct Kv256 {
  static constexpr std::size_t kWidth = 8;
  static constexpr int kMostQueries = 2, kMostSums = 8;
  using F = __m256;
  using I = __m256i;

  static I load(const std::uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  // 2-bit words hold what 4-bit codes have in two registers: tokens 0 and 1, then 2 and 3 of four (keys), or even, then
  // odd channels (values).
  template <int kBits>
  static I key_words(const std::uint8_t* words, std::size_t pass) {
    if constexpr (kBits == 2) return _mm256_srli_epi32(load(words), 8 * static_cast<int>(pass));
    return load(words + 32 * pass);
  }
  template <int kBits>
  static I value_words(const std::uint8_t* words, std::size_t index) {
    if constexpr (kBits == 2) return _mm256_srli_epi32(load(words + 32 * (index / 2)), 8 * static_cast<int>(index % 2));
    return load(words + 32 * index);
  }
  template <int kBits>
  static std::size_t channel(std::size_t index, std::size_t lane) {
    return kBits == 2 ? 16 * (index / 2) + 2 * lane + index % 2 : 8 * index + lane;
  }
  template <int kBits>
  static void store_scores(float* scores, std::size_t pass, const F* sum) {
    if constexpr (kBits == 8) {
      _mm256_storeu_ps(scores + 8 * pass, sum[0]);
    } else {
      const F low = _mm256_unpacklo_ps(sum[0], sum[1]), high = _mm256_unpackhi_ps(sum[0], sum[1]);
      if constexpr (kBits == 4) {
        _mm256_storeu_ps(scores + 16 * pass, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(scores + 16 * pass + 8, _mm256_permute2f128_ps(low, high, 0x31));
      } else {  // lane l: tokens 4 l + 2 pass and the next one
        alignas(32) float pairs[16];
        _mm256_store_ps(pairs, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_store_ps(pairs + 8, _mm256_permute2f128_ps(low, high, 0x31));
        for (std::size_t l = 0; l < 8; ++l) __builtin_memcpy(scores + 4 * l + 2 * pass, pairs + 2 * l, 8);
      }
    }
  }
  template <int kBits>
  static F code(I x, int shift) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x, shift), _mm256_set1_epi32((1 << kBits) - 1)));
  }
  static F broadcast(float x) { return _mm256_set1_ps(x); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
};

}  // namespace

const KvOps kKvAvx2 = {
    "avx2",      true,    float_params_bytes,   quantize_keys, quantize_values, score_quantized<Kv256>,
    score_exact, softmax, sum_quantized<Kv256>, sum_exact};
}  // namespace bitforbit
