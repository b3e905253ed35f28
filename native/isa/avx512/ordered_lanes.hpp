// 16 FP32 lanes in one AVX-512 register, and the transposition of 16 rows into pairs, for generic/ordered.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "generic/ordered.hpp"

namespace bitforbit {
namespace {

// Bytes [16c, 16c + 16) of four rows, one per 128-bit lane: rows 0, 4, 8 and 12 from `rows` on.
inline __m512i gather_lanes(const std::uint8_t* rows, std::size_t stride) {
  const auto at = [&](std::size_t row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride));
  };
  __m512i v = _mm512_castsi128_si512(at(0));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, at(4));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, at(8));
  return _mm512_mask_broadcast_i32x4(v, 0xf000, at(12));
}

struct LanesAvx512 {
  using Lanes = __m512;

  static Lanes zero() { return _mm512_setzero_ps(); }
  static Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
  static void store(float* to, Lanes a) { _mm512_storeu_ps(to, a); }

  static __m512i pair(const std::uint8_t* x) {
    int bits;
    std::memcpy(&bits, x, 4);
    return _mm512_set1_epi32(bits);
  }

  // Four rows at a time are gathered into the lanes of a register, so that two rounds of unpacking remain.
  static void transpose(const std::uint8_t* rows, std::size_t stride, std::uint8_t* to) {
    for (std::size_t c = 0; c < 8; ++c) {  // 16 bytes of every row: four pairs
      __m512i a[4];
      for (std::size_t i = 0; i < 4; ++i) a[i] = gather_lanes(rows + i * stride + 16 * c, stride);
      const __m512i t0 = _mm512_unpacklo_epi32(a[0], a[2]), t1 = _mm512_unpacklo_epi32(a[1], a[3]);
      const __m512i t2 = _mm512_unpackhi_epi32(a[0], a[2]), t3 = _mm512_unpackhi_epi32(a[1], a[3]);
      std::uint8_t* out = to + 256 * c;
      _mm512_storeu_si512(out, _mm512_unpacklo_epi32(t0, t1));
      _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi32(t0, t1));
      _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi32(t2, t3));
      _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi32(t2, t3));
    }
  }
};

}  // namespace
}  // namespace bitforbit
