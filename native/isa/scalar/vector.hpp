// The vector interface in portable C++: the meaning of every operation, one byte at a time.
//
// B is 64 bytes in plane order: position p holds the element of natural index
//   n(p) = p % 16 < 8 ? 8 * (p / 16) + p % 16 : 32 + 8 * (p / 16) + p % 16 - 8   (floats of two and four bytes),
// or p itself (one-byte floats). A 2-bit plane keeps position p at byte p % 16, bits [2 * (p / 16) + 1 : 2 * (p / 16)],
// and a plane of w bits at byte p % (8 * w), bit w * (p / (8 * w)).
#pragma once

#include <cstdint>
#include <cstring>

namespace bitforbit {
namespace {

struct Scalar {
  struct B {
    std::uint8_t v[64];
  };
  struct Table {
    std::uint8_t v[4];
  };

  static constexpr int natural(int p) { return p % 16 < 8 ? 8 * (p / 16) + p % 16 : 32 + 8 * (p / 16) + p % 16 - 8; }

  template <class F>
  static B map(F f) {
    B r;
    for (int p = 0; p < 64; ++p) r.v[p] = static_cast<std::uint8_t>(f(p));
    return r;
  }

  static B zero() {
    return map([](int) { return 0; });
  }
  static B load(const std::uint8_t* p) {
    B r;
    std::memcpy(r.v, p, 64);
    return r;
  }
  static void store(std::uint8_t* p, B b) { std::memcpy(p, b.v, 64); }

  template <class F>
  static B map64(B b, F f) {  // eight bytes at a time
    for (int i = 0; i < 64; i += 8) {
      std::uint64_t word;
      std::memcpy(&word, b.v + i, 8);
      word = f(word);
      std::memcpy(b.v + i, &word, 8);
    }
    return b;
  }
  static constexpr std::uint64_t repeat(int byte) { return 0x0101010101010101u * static_cast<std::uint8_t>(byte); }

  template <int N>
  static B shl(B b) {
    return map64(b, [](std::uint64_t w) { return w << N & repeat(0xff << N); });
  }
  template <int N>
  static B shr(B b) {
    return map64(b, [](std::uint64_t w) { return w >> N & repeat(0xff >> N); });
  }
  static B and_byte(B b, int m) {
    return map([&](int p) { return b.v[p] & m; });
  }
  static B or2(B a, B b) {
    return map([&](int p) { return a.v[p] | b.v[p]; });
  }
  static B or3(B a, B b, B c) { return or2(a, or2(b, c)); }
  static B select(int m, B a, B b) {  // bits of a where m has ones, else of b
    return map([&](int p) { return (a.v[p] & m) | (b.v[p] & ~m); });
  }
  static B min_byte(B b, int n) {
    return map([&](int p) { return b.v[p] < n ? b.v[p] : n; });
  }
  static B sub_byte(B b, int n) {
    return map([&](int p) { return b.v[p] - n; });
  }
  static std::uint64_t equal_mask(B b, int n) {
    std::uint64_t m = 0;
    for (int k = 0; k < 8; ++k) {  // eight bytes of 0 or 1 at a time: the product moves their bits to the top byte
      std::uint8_t equal[8];
      for (int i = 0; i < 8; ++i) equal[i] = b.v[8 * k + i] == n;
      std::uint64_t ones = 0;
      for (int i = 0; i < 8; ++i) ones |= static_cast<std::uint64_t>(equal[i]) << (8 * i);
      m |= (ones * 0x0102040810204080u >> 56) << (8 * k);
    }
    return m;
  }

  template <int W>
  static B unpack(const std::uint8_t* s) {
    B r;
    for (int k = 0; k < 8 / W; ++k) {
      for (int i = 0; i < 8 * W; ++i) r.v[8 * W * k + i] = static_cast<std::uint8_t>(s[i] >> (W * k) & ((1 << W) - 1));
    }
    return r;
  }
  static B unpack4(const std::uint8_t* s) { return unpack<4>(s); }
  static B unpack2(const std::uint8_t* s) { return unpack<2>(s); }
  static B unpack1(const std::uint8_t* s) { return unpack<1>(s); }
  static void pack4(std::uint8_t* d, B b) {  // low four bits of each byte
    for (int i = 0; i < 32; ++i) d[i] = static_cast<std::uint8_t>((b.v[i] & 15) | b.v[i + 32] << 4);
  }
  static void pack2(std::uint8_t* d, B b) {  // bytes 0-3
    for (int i = 0; i < 16; ++i) {
      d[i] = static_cast<std::uint8_t>(b.v[i] | b.v[i + 16] << 2 | b.v[i + 32] << 4 | b.v[i + 48] << 6);
    }
  }
  static void pack1(std::uint8_t* d, B b) {  // the top bit of each byte
    for (int i = 0; i < 8; ++i) {
      int byte = 0;
      for (int k = 0; k < 8; ++k) byte |= (b.v[i + 8 * k] >> 7) << k;
      d[i] = static_cast<std::uint8_t>(byte);
    }
  }

  static Table make_table(const std::uint8_t* ranks) { return {{ranks[0], ranks[1], ranks[2], 0}}; }
  static B lookup(Table t, B digits) {  // digit 3 gives 0
    return map([&](int p) { return t.v[digits.v[p]]; });
  }
  static B expand(B base, std::uint64_t mask, const std::uint8_t* src) {  // base is 0 where mask is set
    B r;
    for (int p = 0; p < 64; ++p, mask >>= 1) {  // without branches: every fourth or so would be mispredicted
      const unsigned bit = mask & 1;
      r.v[p] = static_cast<std::uint8_t>(base.v[p] | (*src & (0u - bit)));
      src += bit;
    }
    return r;
  }
  // 64 exponents from 2-bit digits: 0-2 through the table, each 3 from the next byte of `next`; `used` counts those.
  static B exponents(Table table, const std::uint8_t* packed, const std::uint8_t* next, std::size_t& used) {
    const B digits = unpack2(packed);
    const std::uint64_t threes = equal_mask(digits, 3);
    const B e = expand(lookup(table, digits), threes, next + used);
    used += static_cast<std::size_t>(__builtin_popcountll(threes));
    return e;
  }
  static std::size_t compress_store(std::uint8_t* dst, std::uint64_t mask, B b) {
    std::size_t n = 0;
    for (int p = 0; p < 64; ++p, mask >>= 1) {
      dst[n] = b.v[p];
      n += mask & 1;
    }
    return n;
  }

  // Exponent -> rank: the first of the table's nine entries that equals it, else 9.
  struct Ranker {
    std::uint8_t rank_of[256];
    explicit Ranker(const std::uint8_t* table) {
      std::memset(rank_of, 9, 256);
      for (int r = 8; r >= 0; --r) rank_of[table[r]] = static_cast<std::uint8_t>(r);
    }
    B operator()(B e) const {
      return map([&](int p) { return rank_of[e.v[p]]; });
    }
  };

  static void store8(std::uint8_t* d, B b) { store(d, b); }
  static void store16(std::uint8_t* d, B low, B high) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int half = 0; half < 2; ++half) {
        std::uint16_t words[8];
        for (int i = 0; i < 8; ++i) {
          const int p = 16 * lane + 8 * half + i;
          words[i] = static_cast<std::uint16_t>(low.v[p] | high.v[p] << 8);
        }
        std::memcpy(d + 64 * half + 16 * lane, words, 16);
      }
    }
  }
  static void store32(std::uint8_t* d, B b0, B b1, B b2, B b3) {
    for (int p = 0; p < 64; ++p) {
      std::uint8_t* e = d + 4 * natural(p);
      e[0] = b0.v[p], e[1] = b1.v[p], e[2] = b2.v[p], e[3] = b3.v[p];
    }
  }
  static void load16(const std::uint8_t* s, B& low, B& high) {
    for (int lane = 0; lane < 4; ++lane) {
      for (int half = 0; half < 2; ++half) {
        std::uint16_t words[8];
        std::memcpy(words, s + 64 * half + 16 * lane, 16);
        for (int i = 0; i < 8; ++i) {
          low.v[16 * lane + 8 * half + i] = static_cast<std::uint8_t>(words[i]);
          high.v[16 * lane + 8 * half + i] = static_cast<std::uint8_t>(words[i] >> 8);
        }
      }
    }
  }
  static void load32(const std::uint8_t* s, B& b0, B& b1, B& b2, B& b3) {
    for (int p = 0; p < 64; ++p) {
      const std::uint8_t* e = s + 4 * natural(p);
      b0.v[p] = e[0], b1.v[p] = e[1], b2.v[p] = e[2], b3.v[p] = e[3];
    }
  }
};

}  // namespace
}  // namespace bitforbit
