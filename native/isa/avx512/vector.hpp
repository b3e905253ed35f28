// The vector interface with AVX-512 F, BW, DQ, VL (Skylake-X and later): 64 bytes in one register.
// isa/scalar/vector.hpp says what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "isa/x86_tables.hpp"

namespace bitforbit {
namespace {

struct Avx512 {
  using B = __m512i;
  using Table = __m512i;

  static B byte(int n) { return _mm512_set1_epi8(static_cast<char>(n)); }
  static B zero() { return _mm512_setzero_si512(); }
  static B load(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(std::uint8_t* p, B v) { _mm512_storeu_si512(p, v); }

  template <int N>
  static B shl(B v) {
    return _mm512_and_si512(_mm512_slli_epi16(v, N), byte(0xff << N));
  }
  template <int N>
  static B shr(B v) {
    return _mm512_and_si512(_mm512_srli_epi16(v, N), byte(0xff >> N));
  }
  static B and_byte(B v, int m) { return _mm512_and_si512(v, byte(m)); }
  static B or2(B x, B y) { return _mm512_or_si512(x, y); }
  static B or3(B x, B y, B z) { return _mm512_ternarylogic_epi64(x, y, z, 0xfe); }
  static B select(int m, B x, B y) { return _mm512_ternarylogic_epi64(byte(m), x, y, 0xca); }
  static B min_byte(B v, int n) { return _mm512_min_epu8(v, byte(n)); }
  static B sub_byte(B v, int n) { return _mm512_sub_epi8(v, byte(n)); }
  static std::uint64_t equal_mask(B v, int n) { return _mm512_cmpeq_epi8_mask(v, byte(n)); }

  static B unpack4(const std::uint8_t* s) {
    const __m512i x = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)), byte(15));
  }
  static B unpack2(const std::uint8_t* s) {
    const __m512i x = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s)));
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)), byte(3));
  }
  static B unpack1(const std::uint8_t* s) {
    const __m512i x = _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(s)));
    return _mm512_and_si512(_mm512_srlv_epi64(x, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)), byte(1));
  }
  static __m256i fold(B v) { return _mm256_or_si256(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1)); }
  static void pack4(std::uint8_t* d, B v) {
    const __m512i x = _mm512_and_si512(v, byte(15));
    const __m256i y = fold(_mm512_sllv_epi64(x, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(d), y);
  }
  static void pack2(std::uint8_t* d, B v) {
    const __m256i y = fold(_mm512_sllv_epi64(v, _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6)));
    const __m128i z = _mm_or_si128(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d), z);
  }
  static void pack1(std::uint8_t* d, B v) {
    const __m512i x = _mm512_and_si512(_mm512_srli_epi16(v, 7), byte(1));
    const __m256i y = fold(_mm512_sllv_epi64(x, _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)));
    const __m128i z = _mm_or_si128(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(d), _mm_or_si128(z, _mm_unpackhi_epi64(z, z)));
  }

  static Table make_table(const std::uint8_t* r) {
    return _mm512_set1_epi32(static_cast<int>(r[0] | r[1] << 8 | static_cast<std::uint32_t>(r[2]) << 16));
  }
  static B exponents(Table table, const std::uint8_t* packed, const std::uint8_t* next, std::size_t& used) {
    const auto load128 = [](const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    const B digits = unpack2(packed);
    const __mmask64 threes = _mm512_cmpeq_epi8_mask(digits, byte(3));
    // Minus the number of 3s up to here in these 16 bytes: a running sum. Its complement is the index of the next byte.
    B n = _mm512_movm_epi8(threes);
    n = _mm512_add_epi8(n, _mm512_bslli_epi128(n, 1));
    n = _mm512_add_epi8(n, _mm512_bslli_epi128(n, 2));
    n = _mm512_add_epi8(n, _mm512_bslli_epi128(n, 4));
    n = _mm512_add_epi8(n, _mm512_bslli_epi128(n, 8));
    next += used;
    B from = _mm512_castsi128_si512(load128(next));
    from = _mm512_inserti32x4(from, load128(next + __builtin_popcountll(threes & 0xffff)), 1);
    from = _mm512_inserti32x4(from, load128(next + __builtin_popcountll(threes & 0xffffffff)), 2);
    from = _mm512_inserti32x4(from, load128(next + __builtin_popcountll(threes & 0xffffffffffff)), 3);
    used += static_cast<std::size_t>(__builtin_popcountll(threes));
    return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(table, digits), threes, from,
                                    _mm512_ternarylogic_epi64(n, n, n, 0x55));
  }
  static std::size_t compress_store(std::uint8_t* dst, std::uint64_t mask, B v) {
    const std::uint8_t* begin = dst;
    const __m128i q[4] = {_mm512_castsi512_si128(v), _mm512_extracti32x4_epi32(v, 1), _mm512_extracti32x4_epi32(v, 2),
                          _mm512_extracti32x4_epi32(v, 3)};
    for (int i = 0; i < 4; ++i) {
      const __mmask16 m = static_cast<__mmask16>(mask >> (16 * i));
      const __m512i x = _mm512_maskz_compress_epi32(m, _mm512_cvtepu8_epi32(q[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm512_cvtepi32_epi8(x));
      dst += __builtin_popcount(m);
    }
    return static_cast<std::size_t>(dst - begin);
  }

  struct Ranker {
    __m512i table[9];
    __m512i window, base;  // used if all entries lie within 16 consecutive exponents
    bool windowed;

    explicit Ranker(const std::uint8_t* t) {
      alignas(16) std::uint8_t w[16] = {};
      windowed = window_of_ranks(t, w);
      base = byte(w_base(t));
      window = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(w)));
      for (int r = 0; r < 9; ++r) table[r] = byte(t[r]);
    }
    B operator()(B e) const {
      if (windowed) {  // offsets of 16 and more saturate to 0x80 and above, which the shuffle turns to 0
        const __m512i i = _mm512_adds_epu8(_mm512_sub_epi8(e, base), byte(0x70));
        return _mm512_xor_si512(_mm512_shuffle_epi8(window, i), byte(9));
      }
      __m512i r = byte(9);
      for (int k = 8; k >= 0; --k) r = _mm512_mask_mov_epi8(r, _mm512_cmpeq_epi8_mask(e, table[k]), byte(k));
      return r;
    }
  };

  static void store8(std::uint8_t* d, B v) { store(d, v); }
  static void store16(std::uint8_t* d, B low, B high) {
    store(d, _mm512_unpacklo_epi8(low, high));
    store(d + 64, _mm512_unpackhi_epi8(low, high));
  }
  static void put_words(std::uint8_t* d, __m512i low, __m512i high) {  // 32 low and 32 high words, natural order
    const auto join = [](__m256i l, __m256i h) {
      return _mm512_or_si512(_mm512_cvtepu16_epi32(l), _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    };
    store(d, join(_mm512_castsi512_si256(low), _mm512_castsi512_si256(high)));
    store(d + 64, join(_mm512_extracti64x4_epi64(low, 1), _mm512_extracti64x4_epi64(high, 1)));
  }
  static void store32(std::uint8_t* d, B b0, B b1, B b2, B b3) {
    put_words(d, _mm512_unpacklo_epi8(b0, b1), _mm512_unpacklo_epi8(b2, b3));
    put_words(d + 128, _mm512_unpackhi_epi8(b0, b1), _mm512_unpackhi_epi8(b2, b3));
  }
  static void split_words(__m512i w0, __m512i w1, B& low, B& high) {  // elements 0-31 and 32-63
    const __m512i m = _mm512_set1_epi16(0xff);
    low = _mm512_packus_epi16(_mm512_and_si512(w0, m), _mm512_and_si512(w1, m));
    high = _mm512_packus_epi16(_mm512_srli_epi16(w0, 8), _mm512_srli_epi16(w1, 8));
  }
  static void load16(const std::uint8_t* s, B& low, B& high) {
    split_words(_mm512_loadu_si512(s), _mm512_loadu_si512(s + 64), low, high);
  }
  static __m512i words(__m512i x, __m512i y) {  // low words of 16 + 16 dwords
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(x)), _mm512_cvtepi32_epi16(y), 1);
  }
  static void load32(const std::uint8_t* s, B& b0, B& b1, B& b2, B& b3) {
    const __m512i x0 = _mm512_loadu_si512(s), x1 = _mm512_loadu_si512(s + 64);
    const __m512i x2 = _mm512_loadu_si512(s + 128), x3 = _mm512_loadu_si512(s + 192);
    split_words(words(x0, x1), words(x2, x3), b0, b1);
    split_words(words(_mm512_srli_epi32(x0, 16), _mm512_srli_epi32(x1, 16)),
                words(_mm512_srli_epi32(x2, 16), _mm512_srli_epi32(x3, 16)), b2, b3);
  }
};

}  // namespace
}  // namespace bitforbit
