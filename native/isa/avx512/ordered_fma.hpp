// VDPBF16PS by two FMA, for generic/ordered.hpp.
#pragma once

#include "isa/avx512/ordered_lanes.hpp"
#include "isa/x86_mxcsr.hpp"

namespace bitforbit {
namespace {

// kFlush: denormals are zeros, as for VDPBF16PS.
template <bool kFlush>
struct FmaAvx512 : LanesAvx512 {
  using Flush = Either<kFlush, FlushDenormals>;
  using Keep = Either<kFlush, KeepDenormals>;

  static void fence(Lanes& a) { asm volatile("" : "+v"(a)); }
  static void step(Lanes& sum, const std::uint8_t* pairs, const std::uint8_t* x) {
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000)), w = _mm512_loadu_si512(pairs), v = pair(x);
    const auto floats = [](__m512i a) { return _mm512_castsi512_ps(a); };
    sum = _mm512_fmadd_ps(floats(_mm512_and_si512(w, odd)), floats(_mm512_and_si512(v, odd)), sum);
    sum = _mm512_fmadd_ps(floats(_mm512_slli_epi32(w, 16)), floats(_mm512_slli_epi32(v, 16)), sum);
  }
};

}  // namespace
}  // namespace bitforbit
