// The vector interface with AVX2: 64 bytes in two registers. isa/scalar/vector.hpp says what each operation means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "isa/x86_tables.hpp"

namespace bitforbit {
namespace {

struct Avx2 {
  struct B {
    __m256i a, b;
  };
  using Table = __m256i;

  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static __m256i byte(int n) { return _mm256_set1_epi8(static_cast<char>(n)); }

  static B zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static B load(const std::uint8_t* p) { return {load256(p), load256(p + 32)}; }
  static void store(std::uint8_t* p, B v) { store256(p, v.a), store256(p + 32, v.b); }

  template <int N>
  static B shl(B v) {
    const __m256i m = byte(0xff << N);
    return {_mm256_and_si256(_mm256_slli_epi16(v.a, N), m), _mm256_and_si256(_mm256_slli_epi16(v.b, N), m)};
  }
  template <int N>
  static B shr(B v) {
    const __m256i m = byte(0xff >> N);
    return {_mm256_and_si256(_mm256_srli_epi16(v.a, N), m), _mm256_and_si256(_mm256_srli_epi16(v.b, N), m)};
  }
  static B and_byte(B v, int m) { return {_mm256_and_si256(v.a, byte(m)), _mm256_and_si256(v.b, byte(m))}; }
  static B or2(B x, B y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static B or3(B x, B y, B z) { return or2(x, or2(y, z)); }
  static B select(int m, B x, B y) {
    const __m256i k = byte(m);
    return {_mm256_or_si256(_mm256_and_si256(k, x.a), _mm256_andnot_si256(k, y.a)),
            _mm256_or_si256(_mm256_and_si256(k, x.b), _mm256_andnot_si256(k, y.b))};
  }
  static B min_byte(B v, int n) { return {_mm256_min_epu8(v.a, byte(n)), _mm256_min_epu8(v.b, byte(n))}; }
  static B sub_byte(B v, int n) { return {_mm256_sub_epi8(v.a, byte(n)), _mm256_sub_epi8(v.b, byte(n))}; }
  static std::uint64_t top_bits(B v) {
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(v.a)) |
           static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(v.b))) << 32;
  }
  static std::uint64_t equal_mask(B v, int n) {
    return top_bits({_mm256_cmpeq_epi8(v.a, byte(n)), _mm256_cmpeq_epi8(v.b, byte(n))});
  }

  static B unpack4(const std::uint8_t* s) {
    const __m256i x = load256(s);
    return {_mm256_and_si256(x, byte(15)), _mm256_and_si256(_mm256_srli_epi16(x, 4), byte(15))};
  }
  static B unpack2(const std::uint8_t* s) {
    const __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(s)));
    const __m256i a = _mm256_srlv_epi32(x, _mm256_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2));
    return {_mm256_and_si256(a, byte(3)), _mm256_and_si256(_mm256_srli_epi16(a, 4), byte(3))};
  }
  static B unpack1(const std::uint8_t* s) {
    std::uint64_t bits;
    std::memcpy(&bits, s, 8);
    const __m256i x = _mm256_set1_epi64x(static_cast<long long>(bits));
    const __m256i a = _mm256_srlv_epi64(x, _mm256_setr_epi64x(0, 1, 2, 3));
    return {_mm256_and_si256(a, byte(1)), _mm256_and_si256(_mm256_srli_epi16(a, 4), byte(1))};
  }
  static void pack4(std::uint8_t* d, B v) {
    store256(d,
             _mm256_or_si256(_mm256_and_si256(v.a, byte(15)), _mm256_slli_epi16(_mm256_and_si256(v.b, byte(15)), 4)));
  }
  static void pack2(std::uint8_t* d, B v) {
    const __m256i x = _mm256_or_si256(v.a, _mm256_slli_epi16(v.b, 4));  // lane 0: bits [1:0], [5:4]; lane 1: the rest
    const __m128i y = _mm_or_si128(_mm256_castsi256_si128(x), _mm_slli_epi16(_mm256_extracti128_si256(x, 1), 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d), y);
  }
  static void pack1(std::uint8_t* d, B v) {
    // Positions 8k..8k+7 go to bit k of bytes 0-7: shift each 64-bit lane's top bits to its bit, then fold.
    const __m256i bit = byte(1);
    const __m256i a = _mm256_and_si256(_mm256_srli_epi16(v.a, 7), bit),
                  b = _mm256_and_si256(_mm256_srli_epi16(v.b, 7), bit);
    const __m256i x = _mm256_or_si256(a, _mm256_slli_epi16(b, 4));
    const __m256i y = _mm256_sllv_epi64(x, _mm256_setr_epi64x(0, 1, 2, 3));
    const __m128i z = _mm_or_si128(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(d), _mm_or_si128(z, _mm_unpackhi_epi64(z, z)));
  }

  static Table make_table(const std::uint8_t* r) {
    return _mm256_set1_epi32(static_cast<int>(r[0] | r[1] << 8 | static_cast<std::uint32_t>(r[2]) << 16));
  }
  // Base, and where `threes` is set the bytes at `low` (16 positions) and `high` (the other 16) in order.
  static __m256i fill(__m256i base, __m256i threes, const std::uint8_t* low, const std::uint8_t* high) {
    // Minus the number of 3s up to here in these 16 bytes: a running sum. Its complement is the index of the next
    // byte; elsewhere the complement of zero, for which the shuffle gives zero.
    __m256i n = _mm256_add_epi8(threes, _mm256_bslli_epi128(threes, 1));
    n = _mm256_add_epi8(n, _mm256_bslli_epi128(n, 2));
    n = _mm256_add_epi8(n, _mm256_bslli_epi128(n, 4));
    n = _mm256_add_epi8(n, _mm256_bslli_epi128(n, 8));
    const __m256i index = _mm256_xor_si256(_mm256_and_si256(n, threes), byte(0xff));
    const __m256i from =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
    return _mm256_or_si256(base, _mm256_shuffle_epi8(from, index));
  }
  static B exponents(Table table, const std::uint8_t* packed, const std::uint8_t* next, std::size_t& used) {
    const B digits = unpack2(packed);
    const B threes = {_mm256_cmpeq_epi8(digits.a, byte(3)), _mm256_cmpeq_epi8(digits.b, byte(3))};
    const std::uint64_t mask = top_bits(threes);
    next += used;
    const B r = {fill(_mm256_shuffle_epi8(table, digits.a), threes.a, next, next + __builtin_popcountll(mask & 0xffff)),
                 fill(_mm256_shuffle_epi8(table, digits.b), threes.b, next + __builtin_popcountll(mask & 0xffffffff),
                      next + __builtin_popcountll(mask & 0xffffffffffff))};
    used += static_cast<std::size_t>(__builtin_popcountll(mask));
    return r;
  }
  static std::size_t compress_store(std::uint8_t* dst, std::uint64_t mask, B v) {
    alignas(32) std::uint8_t bytes[64];
    store(bytes, v);
    return compress64(dst, mask, bytes);
  }

  struct Ranker {
    __m256i table[9];
    __m256i window, base;  // used if all entries lie within 16 consecutive exponents
    bool windowed;

    explicit Ranker(const std::uint8_t* t) {
      alignas(16) std::uint8_t w[16] = {};
      windowed = window_of_ranks(t, w);
      base = byte(w_base(t));
      window = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(w)));
      for (int r = 0; r < 9; ++r) table[r] = byte(t[r]);
    }
    __m256i rank(__m256i e) const {
      if (windowed) {  // offsets of 16 and more saturate to 0x80 and above, which the shuffle turns to 0
        const __m256i i = _mm256_adds_epu8(_mm256_sub_epi8(e, base), byte(0x70));
        return _mm256_xor_si256(_mm256_shuffle_epi8(window, i), byte(9));
      }
      __m256i r = byte(9);
      for (int k = 8; k >= 0; --k) r = _mm256_blendv_epi8(r, byte(k), _mm256_cmpeq_epi8(e, table[k]));
      return r;
    }
    B operator()(B e) const { return {rank(e.a), rank(e.b)}; }
  };

  static void store8(std::uint8_t* d, B v) { store256(d, v.a), store256(d + 32, v.b); }
  static void store16(std::uint8_t* d, B low, B high) {
    store256(d, _mm256_unpacklo_epi8(low.a, high.a));
    store256(d + 32, _mm256_unpacklo_epi8(low.b, high.b));
    store256(d + 64, _mm256_unpackhi_epi8(low.a, high.a));
    store256(d + 96, _mm256_unpackhi_epi8(low.b, high.b));
  }
  static void put_words(std::uint8_t* d, __m256i low, __m256i high) {  // 16 low and 16 high words, natural order
    const __m256i x = _mm256_unpacklo_epi16(low, high), y = _mm256_unpackhi_epi16(low, high);
    store256(d, _mm256_permute2x128_si256(x, y, 0x20));
    store256(d + 32, _mm256_permute2x128_si256(x, y, 0x31));
  }
  static void store32(std::uint8_t* d, B b0, B b1, B b2, B b3) {
    put_words(d, _mm256_unpacklo_epi8(b0.a, b1.a), _mm256_unpacklo_epi8(b2.a, b3.a));
    put_words(d + 64, _mm256_unpacklo_epi8(b0.b, b1.b), _mm256_unpacklo_epi8(b2.b, b3.b));
    put_words(d + 128, _mm256_unpackhi_epi8(b0.a, b1.a), _mm256_unpackhi_epi8(b2.a, b3.a));
    put_words(d + 192, _mm256_unpackhi_epi8(b0.b, b1.b), _mm256_unpackhi_epi8(b2.b, b3.b));
  }
  // Words w0 = elements 0-15, w1 = 16-31, w2 = 32-47, w3 = 48-63.
  static void split_words(__m256i w0, __m256i w1, __m256i w2, __m256i w3, B& low, B& high) {
    const __m256i m = _mm256_set1_epi16(0xff);
    low = {_mm256_packus_epi16(_mm256_and_si256(w0, m), _mm256_and_si256(w2, m)),
           _mm256_packus_epi16(_mm256_and_si256(w1, m), _mm256_and_si256(w3, m))};
    high = {_mm256_packus_epi16(_mm256_srli_epi16(w0, 8), _mm256_srli_epi16(w2, 8)),
            _mm256_packus_epi16(_mm256_srli_epi16(w1, 8), _mm256_srli_epi16(w3, 8))};
  }
  static void load16(const std::uint8_t* s, B& low, B& high) {
    split_words(load256(s), load256(s + 32), load256(s + 64), load256(s + 96), low, high);
  }
  static void load32(const std::uint8_t* s, B& b0, B& b1, B& b2, B& b3) {
    __m256i lo[4], hi[4];
    for (int i = 0; i < 4; ++i) {
      const __m256i x = load256(s + 64 * i), y = load256(s + 64 * i + 32), m = _mm256_set1_epi32(0xffff);
      lo[i] = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_and_si256(x, m), _mm256_and_si256(y, m)), 0xd8);
      hi[i] = _mm256_permute4x64_epi64(_mm256_packus_epi32(_mm256_srli_epi32(x, 16), _mm256_srli_epi32(y, 16)), 0xd8);
    }
    split_words(lo[0], lo[1], lo[2], lo[3], b0, b1);
    split_words(hi[0], hi[1], hi[2], hi[3], b2, b3);
  }
};

}  // namespace
}  // namespace bitforbit
