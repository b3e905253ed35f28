// Quantized caches in portable C++: vectors of one lane.
#include "generic/kv_exact.hpp"
#include "generic/kv_products.hpp"
#include "generic/kv_quantize.hpp"

namespace bitforbit {
namespace {

struct KvScalar {
  static constexpr std::size_t kWidth = 1;
  static constexpr int kMostQueries = 4, kMostSums = 4;
  using F = float;
  using I = std::uint32_t;

  static I load(const std::uint8_t* p) {
    I word;
    __builtin_memcpy(&word, p, 4);
    return word;
  }
  // A 2-bit word holds four tokens: its halves' low or high bytes are a pass.
  template <int kBits>
  static I key_words(const std::uint8_t* words, std::size_t pass) {
    if constexpr (kBits == 2) return load(words + 4 * (pass / 2)) >> 8 * (pass % 2);
    return load(words + 4 * pass);
  }
  // And two channels: low bytes the even ones.
  template <int kBits>
  static I value_words(const std::uint8_t* words, std::size_t index) {
    return key_words<kBits>(words, index);
  }
  template <int>
  static std::size_t channel(std::size_t index, std::size_t) {
    return index;
  }
  template <int kBits>
  static F code(I x, int shift) {
    return static_cast<float>(static_cast<std::int32_t>(x >> shift & ((1u << kBits) - 1)));
  }
  template <int kBits>
  static void store_scores(float* scores, std::size_t pass, const F* sum) {
    constexpr std::size_t kTokens = kBits == 8 ? 1 : 2;
    for (std::size_t e = 0; e < kTokens; ++e) scores[kTokens * pass + e] = sum[e];
  }
  static F broadcast(float x) { return x; }
  static F mul(F a, F b) { return a * b; }
  static F add(F a, F b) { return a + b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static void store(float* p, F x) { *p = x; }
};

}  // namespace

const KvOps kKvScalar = {
    "scalar",    true,    float_params_bytes,      quantize_keys, quantize_values, score_quantized<KvScalar>,
    score_exact, softmax, sum_quantized<KvScalar>, sum_exact};
}  // namespace bitforbit
