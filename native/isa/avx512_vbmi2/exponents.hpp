// Exponents of `planes` groups with AVX-512 VBMI2, for kernels that decode 16 x 64 tiles on their way.
#pragma once

#include "isa/avx512_vbmi2/vector.hpp"
#include "planes_block.hpp"

namespace bitforbit {
namespace {

// One level of digits: what a 3 stands for is the next byte of `next`.
struct Exponents {
  Avx512::Table table;
  const std::uint8_t* next;

  __m512i operator()(const std::uint8_t* digits) {
    const __m512i d = Avx512Vbmi2::unpack2(digits);
    const std::uint64_t threes = Avx512Vbmi2::equal_mask(d, 3);
    const __m512i e = Avx512Vbmi2::expand(Avx512Vbmi2::lookup(table, d), threes, next);
    next += __builtin_popcountll(threes);
    return e;
  }
};

// Expands the tail of a block into its scratch. False: it contradicts the digits.
inline bool expand_tail(const DecodeBlock& b) {
  Exponents level3{Avx512::make_table(b.table + 6), b.exponents4};
  for (std::size_t i = 0; i < b.n3; i += kGroup) {
    Avx512::store(b.exponents3 + i, level3(b.level3 + i / 4));
    if (level3.next > b.exponents4 + b.n4) return false;
  }
  Exponents level2{Avx512::make_table(b.table + 3), b.exponents3};
  for (std::size_t i = 0; i < b.n2; i += kGroup) {
    Avx512::store(b.exponents2 + i, level2(b.level2 + i / 4));
    if (level2.next > b.exponents3 + b.n3) return false;
  }
  return level3.next == b.exponents4 + b.n4 && level2.next == b.exponents3 + b.n3;
}

// Exponents and sign+mantissa bytes, as words of two columns -> pairs of BF16: the lower and the upper four words of
// every 128-bit lane.
inline void join_words(__m512i e, __m512i top, __m512i& low_words, __m512i& high_words) {
  // top: [7] sign, [6:0] mantissa; low byte of the float: [7] exponent[0]; high byte: [7] sign, [6:0] exponent[7:1].
  const __m512i low = Avx512::select(0x7f, top, _mm512_slli_epi16(e, 7));
  const __m512i high = Avx512::select(0x80, top, _mm512_srli_epi16(e, 1));
  low_words = _mm512_unpacklo_epi8(low, high);
  high_words = _mm512_unpackhi_epi8(low, high);
}

}  // namespace
}  // namespace bitforbit
