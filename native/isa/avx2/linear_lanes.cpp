// Family `lanes` with AVX2 and FMA: two registers per output, summed in two passes over a panel.
#include "generic/linear_lanes.hpp"

#include "isa/avx2/vector.hpp"
#include "isa/x86_lanes_pack.hpp"

namespace bitforbit {
namespace {

struct Lanes256 {
  static constexpr int kParts = 2;
  static constexpr std::size_t kInputBytes = 128, kRows = 2;
  static constexpr bool kDirect = false, kBeside = false;
  using Sum = __m256;
  struct Weights {
    __m256 odd, even;
  };
  using Inputs = Weights;

  static Sum load_sum(const float* p, int part) { return _mm256_loadu_ps(p + 8 * part); }
  static void store_sum(float* p, int part, Sum s) { _mm256_storeu_ps(p + 8 * part, s); }
  static Weights load_weights(const std::uint8_t* p, int part) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * part));
    return {_mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000)))),
            _mm256_castsi256_ps(_mm256_slli_epi32(w, 16))};
  }
  static Inputs load_inputs(const std::uint8_t* p, int part) {
    const float* f = reinterpret_cast<const float*>(p);
    return {_mm256_load_ps(f + 8 * part), _mm256_load_ps(f + 16 + 8 * part)};
  }
  static Sum step(Sum sum, Weights w, Inputs x) {
    return _mm256_fmadd_ps(w.even, x.even, _mm256_fmadd_ps(w.odd, x.odd, sum));
  }
  static void pack(const LinearInput& in, std::uint8_t* packed) { pack_odd_even<Lanes256>(in, packed); }

  using Flush = FlushDenormals;

  static float add_lanes(const float* lanes) {  // l and l + 8, then 4, 2, 1
    const __m256 a = _mm256_add_ps(_mm256_loadu_ps(lanes), _mm256_loadu_ps(lanes + 8));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }
  struct Group {
    Avx2::B low, high;
    void store(std::uint8_t* out) const { Avx2::store16(out, low, high); }
  };
  // From exponents rotated right by one bit, [7] exponent[0], [6:0] exponent[7:1], and [7] sign, [6:0] mantissa.
  static Group join(Avx2::B e, const std::uint8_t* sign_mantissa) {
    const Avx2::B sm = Avx2::load(sign_mantissa);
    const __m256i top = Avx2::byte(0x80);  // the top bits change places
    const __m256i a = _mm256_and_si256(_mm256_xor_si256(sm.a, e.a), top);
    const __m256i b = _mm256_and_si256(_mm256_xor_si256(sm.b, e.b), top);
    return {{_mm256_xor_si256(sm.a, a), _mm256_xor_si256(sm.b, b)},
            {_mm256_xor_si256(e.a, a), _mm256_xor_si256(e.b, b)}};
  }
};

}  // namespace

const LinearOps kLanesAvx2 = lanes_ops<Avx2, Lanes256>("avx2", true, true);
}  // namespace bitforbit
