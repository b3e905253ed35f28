// Byte shuffles that compress eight bytes by an 8-bit mask (AVX2 and plain AVX-512 have no such instruction).
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace bitforbit {
namespace {

struct ByteShuffles {
  alignas(64) std::uint64_t compress[256];  // byte k: the position of the k-th set bit, 0x80 behind the last

  constexpr ByteShuffles() : compress{} {
    for (unsigned mask = 0; mask < 256; ++mask) {
      std::uint64_t c = 0x8080808080808080u;
      unsigned n = 0;
      for (unsigned i = 0; i < 8; ++i) {
        if (mask >> i & 1) {
          c = (c & ~(std::uint64_t{0xff} << (8 * n))) | std::uint64_t{i} << (8 * n);
          ++n;
        }
      }
      compress[mask] = c;
    }
  }
};

constexpr ByteShuffles kShuffles{};

// Smallest of a code table's nine exponents.
inline std::uint8_t w_base(const std::uint8_t* table) {
  std::uint8_t base = table[0];
  for (int r = 1; r < 9; ++r) base = table[r] < base ? table[r] : base;
  return base;
}

// Whether the nine exponents lie within 16 consecutive ones; then w[e - w_base] is rank ^ 9, 0 for exponents without
// a rank. (A byte shuffle gives 0 for every index with its top bit set, hence the exclusive or.)
inline bool window_of_ranks(const std::uint8_t* table, std::uint8_t w[16]) {
  const std::uint8_t base = w_base(table);
  for (int r = 8; r >= 0; --r) {
    if (table[r] - base > 15) return false;
    w[table[r] - base] = static_cast<std::uint8_t>(r ^ 9);
  }
  return true;
}

// Stores the bytes of the 64 at `from` whose mask bit is set; writes up to 64 bytes. Returns how many count.
inline std::size_t compress64(std::uint8_t* dst, std::uint64_t mask, const std::uint8_t* from) {
  std::uint8_t* d = dst;
  for (int i = 0; i < 8; ++i) {
    const std::uint32_t m = mask >> (8 * i) & 0xff;
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
    const __m128i index = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kShuffles.compress[m]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(d), _mm_shuffle_epi8(bytes, index));
    d += __builtin_popcount(m);
  }
  return static_cast<std::size_t>(d - dst);
}

}  // namespace
}  // namespace bitforbit
