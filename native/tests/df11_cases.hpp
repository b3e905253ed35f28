// A DF11 unit in memory, made from BF16 words: for tests and fuzzing of the decoder.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "df11.hpp"

namespace bitforbit::testing {

// Every array is exactly as long as the format makes it, so that AddressSanitizer sees reads past its end.
struct Df11Case {
  std::vector<std::uint8_t> luts, encoded, sign_mantissa, gaps;
  std::vector<std::uint32_t> positions;

  df11::EncodedUnit view() const { return {luts, encoded, sign_mantissa, positions, gaps}; }
};

enum class CodeShape { kFlat, kSkewed };  // eight bits each; or 1, 2, ... 32 bits, so that all four table levels exist

inline constexpr std::size_t kMaxSkewedSymbols = 33;

// A canonical prefix code for the exponents present, and its decode tables. Exponents are below 240.
struct Df11Code {
  std::array<std::uint32_t, 256> codes{};
  std::array<std::uint8_t, 256> lengths{};
  std::vector<std::uint8_t> luts;

  Df11Code(std::span<const std::uint16_t> words, CodeShape shape) {
    std::array<bool, 256> present{};
    for (const std::uint16_t word : words) present[word >> 7 & 0xff] = true;
    std::uint64_t code = 0;
    unsigned length = shape == CodeShape::kFlat ? 8 : 0;
    for (unsigned e = 0; e < 256; ++e) {
      if (!present[e]) continue;
      if (shape == CodeShape::kSkewed && length < 32) {
        ++length;
        code <<= 1;
      }
      codes[e] = static_cast<std::uint32_t>(code);
      lengths[e] = static_cast<std::uint8_t>(length);
      // The codes 0, 10, 110, ... and, at the end, two of 32 bits.
      ++code;
    }
    make_luts();
  }

 private:
  void make_luts() {
    // One table for every run of whole bytes that a code has before its last byte: (levels, bits) -> table number.
    std::map<std::pair<unsigned, std::uint32_t>, std::size_t> tables{{{0, 0}, 0}};
    for (unsigned e = 0; e < 256; ++e) {
      for (unsigned level = 1; 8 * level < lengths[e]; ++level) tables[{level, codes[e] >> (lengths[e] - 8 * level)}];
    }
    std::size_t number = 0;
    for (auto& [prefix, table] : tables) table = number++;
    luts.assign((tables.size() + 1) * 256, 0);
    for (unsigned e = 0; e < 256; ++e) {
      if (!lengths[e]) continue;
      luts[tables.size() * 256 + e] = lengths[e];
      std::size_t table = 0;
      unsigned level = 0;
      for (; 8 * (level + 1) < lengths[e]; ++level) {
        const std::uint32_t prefix = codes[e] >> (lengths[e] - 8 * (level + 1));
        const std::size_t next = tables.at({level + 1, prefix});
        luts[table * 256 + (prefix & 0xff)] = static_cast<std::uint8_t>(256 - next);
        table = next;
      }
      const unsigned rest = lengths[e] - 8 * level, span = 1u << (8 - rest);
      const unsigned first = (codes[e] & ((1u << rest) - 1)) << (8 - rest);
      for (unsigned i = 0; i < span; ++i) luts[table * 256 + first + i] = static_cast<std::uint8_t>(e);
    }
  }
};

inline Df11Case encode_df11(std::span<const std::uint16_t> words, CodeShape shape, std::size_t chunk_elements,
                            int threads) {
  const Df11Code code(words, shape);
  Df11Case unit;
  unit.luts = code.luts;
  unit.sign_mantissa.resize(words.size());
  const std::size_t chunks = df11::chunk_count(words.size(), chunk_elements);
  std::vector<std::uint32_t> histograms(chunks * 256);
  df11::split_and_count(words, chunk_elements, threads, unit.sign_mantissa, histograms);

  std::vector<std::uint64_t> chunk_bits(chunks);
  std::uint64_t bits = 0;
  for (std::size_t c = 0; c < chunks; ++c) {
    chunk_bits[c] = bits;
    for (std::size_t e = 0; e < 256; ++e) bits += std::uint64_t{histograms[c * 256 + e]} * code.lengths[e];
  }
  const std::size_t encoded_bytes = static_cast<std::size_t>((bits + 7) / 8);
  const std::size_t blocks = (encoded_bytes + df11::kBlockBytes - 1) / df11::kBlockBytes;
  std::vector<std::uint64_t> windows(blocks * df11::kWindowsPerBlock);
  std::vector<std::uint8_t> gaps(windows.size());
  unit.positions.assign(blocks + 1, 0);
  df11::encode(words, chunk_elements, chunk_bits, 0, {code.codes, code.lengths}, threads,
               {windows, gaps, unit.positions});
  unit.positions[blocks] = static_cast<std::uint32_t>(words.size());
  unit.gaps.resize(blocks * df11::kGapBytesPerBlock);
  df11::pack_gaps(gaps, unit.gaps);
  unit.encoded.resize(encoded_bytes);
  if (encoded_bytes) std::memcpy(unit.encoded.data(), windows.data(), encoded_bytes);
  return unit;
}

}  // namespace bitforbit::testing
