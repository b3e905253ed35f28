// The vector interface with AVX-512 VBMI2 (Ice Lake, Zen 4 and later): byte compress and expand in one instruction.
#pragma once

#include "isa/avx512/vector.hpp"

namespace bitforbit {
namespace {

struct Avx512Vbmi2 : Avx512 {
  // VPERMB looks at the low six bits of each byte only, so a table with period four takes digits with whatever lies
  // above them. Digit 3 is looked up too, as a value that digits 0-2 do not have, and told by it.
  struct Table {
    __m512i exponents, three;
  };
  static Table make_table(const std::uint8_t* r) {
    std::uint8_t three = 0;
    while (three == r[0] || three == r[1] || three == r[2]) ++three;
    return {
        _mm512_set1_epi32(static_cast<int>(r[0] | r[1] << 8 | r[2] << 16 | static_cast<std::uint32_t>(three) << 24)),
        byte(three)};
  }
  static B exponents(Table table, const std::uint8_t* packed, const std::uint8_t* next, std::size_t& used) {
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i digits = _mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
    const __m512i e = _mm512_permutexvar_epi8(digits, table.exponents);
    const __mmask64 threes = _mm512_cmpeq_epi8_mask(e, table.three);
    const __m512i r = _mm512_mask_expand_epi8(e, threes, _mm512_loadu_si512(next + used));
    used += static_cast<std::size_t>(__builtin_popcountll(threes));
    return r;
  }
  static std::size_t compress_store(std::uint8_t* dst, std::uint64_t mask, B v) {
    // To a register first: the form with a memory operand is microcoded on Zen 4.
    _mm512_storeu_si512(dst, _mm512_maskz_compress_epi8(mask, v));
    return static_cast<std::size_t>(__builtin_popcountll(mask));
  }
};

}  // namespace
}  // namespace bitforbit
