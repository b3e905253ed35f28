// The vector interface with AVX-512 VBMI2 (Ice Lake, Zen 4 and later): byte compress and expand in one instruction.
#pragma once

#include "isa/avx512/vector.hpp"

namespace bitforbit {
namespace {

struct Avx512Vbmi2 : Avx512 {
  static B expand(B base, std::uint64_t mask, const std::uint8_t* src) {
    return _mm512_mask_expand_epi8(base, mask, _mm512_loadu_si512(src));
  }
  static std::size_t compress_store(std::uint8_t* dst, std::uint64_t mask, B v) {
    // To a register first: the form with a memory operand is microcoded on Zen 4.
    _mm512_storeu_si512(dst, _mm512_maskz_compress_epi8(mask, v));
    return static_cast<std::size_t>(__builtin_popcountll(mask));
  }
};

}  // namespace
}  // namespace bitforbit
