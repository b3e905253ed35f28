// Inputs for tests of the planes codec: float kinds, hostile shapes and bit patterns, instruction sets to try.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "planes.hpp"
#include "tests/check.hpp"
#include "tests/vbmi2_emulated.hpp"

namespace bitforbit::testing {

struct KindCase {
  const char* name;
  Kind kind;
  bool wide;
  int item_bits, exponent_bits, mantissa_bits;  // of the coded float: 16 bits for a widened BF16
};

inline constexpr KindCase kKinds[] = {
    {"BF16", Kind::kBF16, false, 16, 8, 7},     {"BF16 as F32", Kind::kBF16, true, 16, 8, 7},
    {"F16", Kind::kF16, false, 16, 5, 10},      {"F32", Kind::kF32, false, 32, 8, 23},
    {"F8_E4M3", Kind::kF8E4M3, false, 8, 4, 3}, {"F8_E5M2", Kind::kF8E5M2, false, 8, 5, 2},
};

struct Shape {
  std::size_t rows, cols;
};

inline constexpr Shape kShapes[] = {{1, 1},   {1, 63},   {1, 64},    {1, 65},   {15, 64}, {16, 64},
                                    {17, 64}, {17, 130}, {33, 1000}, {5, 4096}, {64, 1},  {100, 3}};

enum class Pattern { kConstant, kZero, kNarrow, kNineApart, kWide, kRandomBits };
inline constexpr Pattern kPatterns[] = {Pattern::kConstant,  Pattern::kZero, Pattern::kNarrow,
                                        Pattern::kNineApart, Pattern::kWide, Pattern::kRandomBits};

// One word of the coded float, by pattern. kNarrow is what weights look like: about half of the exponents are the
// top one, each lower one half as often. kNineApart has nine exponents that no window of 16 holds (where the float has
// that many), kWide a falling distribution over all of them.
inline std::uint32_t make_word(const KindCase& c, Pattern pattern, Random& random) {
  const std::uint32_t exponents = 1u << c.exponent_bits, mask = exponents - 1;
  const std::uint32_t rest = static_cast<std::uint32_t>(random.bits());
  std::uint32_t exponent = 0;
  switch (pattern) {
    case Pattern::kConstant: return 0x3f8c0101u >> (32 - c.item_bits);
    case Pattern::kZero: return 0;
    case Pattern::kRandomBits: return c.item_bits == 32 ? rest : rest & ((1u << c.item_bits) - 1);
    case Pattern::kNarrow:
      exponent = exponents * 15 / 32 - static_cast<std::uint32_t>(__builtin_ctzll(random.bits() | 1ull << 40));
      break;
    case Pattern::kNineApart: exponent = static_cast<std::uint32_t>(random.below(9)) * (exponents / 9); break;
    case Pattern::kWide: {
      const std::size_t top = 1 + random.below(exponents);
      exponent = static_cast<std::uint32_t>(random.below(top));
      break;
    }
  }
  const std::uint32_t sign = rest & 1, mantissa = (rest >> 1) & ((1u << c.mantissa_bits) - 1);
  return sign << (c.exponent_bits + c.mantissa_bits) | (exponent & mask) << c.mantissa_bits | mantissa;
}

inline void put_word(const KindCase& c, std::uint8_t* out, std::size_t i, std::uint32_t word) {
  const std::size_t bytes = static_cast<std::size_t>(c.item_bits) / 8;
  if (c.wide) {
    word <<= 16;
    std::memcpy(out + 4 * i, &word, 4);
  } else {
    std::memcpy(out + bytes * i, &word, bytes);  // little-endian, as the format is
  }
}

inline ExactBytes make_floats(const KindCase& c, const Layout& layout, Pattern pattern, Random& random,
                              std::size_t shift = 0) {
  ExactBytes data(layout.rows * layout.row_bytes(), shift);
  for (std::size_t i = 0; i < layout.rows * layout.cols; ++i)
    put_word(c, data.data(), i, make_word(c, pattern, random));
  return data;
}

// Every implementation that this CPU can run, scalar first. Throws Failure if it is scalar alone on a CPU with AVX2.
inline std::vector<const PlanesOps*> usable_ops() {
  std::vector<const PlanesOps*> usable;
  for (const Implementation& i : implementations()) {
    if (i.supported && (usable.empty() || usable.back() != i.planes)) usable.push_back(i.planes);
  }
#if BITFORBIT_X86
  if (find_implementation("avx512")) usable.push_back(&kPlanesAvx512Vbmi2Emulated);
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && usable.size() < 2) fail(__FILE__, __LINE__, "AVX2 was not dispatched");
#endif
  return usable;
}

// The four parts of an encoded matrix, each in an allocation of exactly its size.
struct ExactParts {
  ExactBytes code, digits, sign_mantissa, tails;

  explicit ExactParts(const EncodedPlanes& e, std::size_t shift = 0)
      : code(bytes(e.code), shift),
        digits(bytes(e.digits), shift),
        sign_mantissa(bytes(e.sign_mantissa), shift),
        tails(bytes(e.tails), shift) {}
  PlanesParts view() const { return {code.span(), digits.span(), sign_mantissa.span(), tails.span()}; }
  static std::span<const std::uint8_t> bytes(const Buffer& b) { return {b.data(), b.size()}; }
};

inline std::string describe(const KindCase& c, const Layout& layout, const PlanesOps& ops) {
  return std::string(c.name) + " " + std::to_string(layout.rows) + " x " + std::to_string(layout.cols) + " on " +
         ops.name + (layout.rows_per_table ? ", " + std::to_string(layout.rows_per_table) + " rows per table" : "");
}

}  // namespace bitforbit::testing
