// Exponents of `planes` groups with AVX-512 VBMI2, for kernels that decode 16 x 64 tiles on their way.
#pragma once

#include "generic/linear_lanes.hpp"
#include "isa/avx512_vbmi2/vector.hpp"
#include "planes_block.hpp"

namespace bitforbit {
namespace {

// The exponents of a block's groups, one group after the other, rotated right by one bit (see expand_tail).
struct Exponents {
  Avx512Vbmi2::Table table;
  const std::uint8_t* exponents2;
  std::size_t used = 0, n2;

  explicit Exponents(const DecodeBlock& b) : exponents2(b.exponents2), n2(b.n2) {
    std::uint8_t rotated[kTableBytes];
    rotate_exponents(b.table, rotated);
    table = Avx512Vbmi2::make_table(rotated);
  }
  __m512i operator()(const std::uint8_t* digits) { return Avx512Vbmi2::exponents(table, digits, exponents2, used); }
};

// Rotated exponents and sign+mantissa bytes, two columns a word -> pairs of BF16 from the lower and from the upper four
// words of every 128-bit lane.
inline void join_words(__m512i rotated, __m512i top, __m512i& low_words, __m512i& high_words) {
  // rotated: [7] exponent[0], [6:0] exponent[7:1]; top: [7] sign, [6:0] mantissa. Their top bits change places.
  const __m512i low7 = _mm512_set1_epi8(0x7f);
  const __m512i low = _mm512_ternarylogic_epi64(rotated, top, low7, 0xd8);   // low7 ? top : rotated
  const __m512i high = _mm512_ternarylogic_epi64(rotated, top, low7, 0xe4);  // low7 ? rotated : top
  low_words = _mm512_unpacklo_epi8(low, high);
  high_words = _mm512_unpackhi_epi8(low, high);
}

}  // namespace
}  // namespace bitforbit
