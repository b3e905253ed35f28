// Families `vdpbf16` and `vdpbf16_emulated` with AVX2 and FMA.
#include "generic/ordered.hpp"

#include "generic/planes.hpp"
#include "isa/avx2/vector.hpp"
#include "isa/x86_mxcsr.hpp"

namespace bitforbit {
namespace {

// kFlush: denormals are zeros, as for VDPBF16PS.
template <bool kFlush>
struct FmaAvx2 {
  struct Lanes {
    __m256 low, high;
  };
  using Flush = Either<kFlush, FlushDenormals>;
  using Keep = Either<kFlush, KeepDenormals>;

  static void fence(Lanes& a) { asm volatile("" : "+x"(a.low), "+x"(a.high)); }
  static Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Lanes add(Lanes a, Lanes b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static void store(float* to, Lanes a) {
    _mm256_storeu_ps(to, a.low);
    _mm256_storeu_ps(to + 8, a.high);
  }

  static void transpose(const std::uint8_t* rows, std::size_t stride, std::uint8_t* to) {
    for (std::size_t p = 0; p < kPairs; ++p) {
      for (std::size_t r = 0; r < kBlockRows; ++r) std::memcpy(to + 64 * p + 4 * r, rows + r * stride + 4 * p, 4);
    }
  }

  static __m256 half(__m256 sum, const std::uint8_t* pairs, __m256i x) {
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
    const auto floats = [](__m256i v) { return _mm256_castsi256_ps(v); };
    sum = _mm256_fmadd_ps(floats(_mm256_and_si256(w, odd)), floats(_mm256_and_si256(x, odd)), sum);
    return _mm256_fmadd_ps(floats(_mm256_slli_epi32(w, 16)), floats(_mm256_slli_epi32(x, 16)), sum);
  }
  static void step(Lanes& sum, const std::uint8_t* pairs, const std::uint8_t* x) {
    int pair;
    std::memcpy(&pair, x, 4);
    sum.low = half(sum.low, pairs, _mm256_set1_epi32(pair));
    sum.high = half(sum.high, pairs + 32, _mm256_set1_epi32(pair));
  }
};

bool has_fma() { return __builtin_cpu_supports("fma"); }

}  // namespace

const LinearOps kVdpbf16Avx2 =
    ordered_ops<FmaAvx2<true>>("vdpbf16", "avx2", true, multiply_decoded<Avx2, FmaAvx2<true>>, has_fma);
const LinearOps kEmulatedAvx2 =
    ordered_ops<FmaAvx2<false>>("vdpbf16_emulated", "avx2", false, multiply_decoded<Avx2, FmaAvx2<false>>, has_fma);
}  // namespace bitforbit
