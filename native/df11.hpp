// DFloat11 (DF11): Huffman-coded BF16 exponents beside one byte of sign and mantissa per weight.
//
// The stream is cut into windows of 64 bits and blocks of 512 windows (4096 bytes). For every window the format keeps
// the offset of the first code that starts in it ("gap", 0..31), for every block the number of codes before it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace bitforbit::df11 {

inline constexpr std::size_t kWindowBits = 64;
inline constexpr std::size_t kWindowsPerBlock = 512;
inline constexpr std::size_t kBlockBytes = kWindowsPerBlock * kWindowBits / 8;
inline constexpr std::size_t kGapBytesPerBlock = kWindowsPerBlock * 5 / 8;
inline constexpr int kMaxCodeBits = 32;

// Number of chunks, the unit of work of the encoder, in `elements` weights.
std::size_t chunk_count(std::size_t elements, std::size_t chunk_elements);

// Splits BF16 words: sign (bit 7) and mantissa (bits 6..0) go to sign_mantissa, exponents are counted.
// histograms is [chunks, 256], row-major.
void split_and_count(std::span<const std::uint16_t> words, std::size_t chunk_elements, int threads,
                     std::span<std::uint8_t> sign_mantissa, std::span<std::uint32_t> histograms);

// One prefix code: code in the low `length` bits. Length 0: the value does not occur.
struct CodeTable {
  std::span<const std::uint32_t> codes;   // [256]
  std::span<const std::uint8_t> lengths;  // [256]
};

// Where the encoder writes: shared by all matrices of a unit.
struct EncodeTarget {
  std::span<std::uint64_t> windows;    // the bit stream, big-endian windows; zero before the first call
  std::span<std::uint8_t> gaps;        // [windows], one byte each; zero before the first call
  std::span<std::uint32_t> positions;  // [windows / 512 + 1]: first element that starts in each block
};

// Writes the codes of all exponents of `words`. Chunk c starts at bit chunk_bits[c] of the stream and its first weight
// is element first_element + c * chunk_elements of the unit. Throws CorruptData where the code table cannot be used.
void encode(std::span<const std::uint16_t> words, std::size_t chunk_elements, std::span<const std::uint64_t> chunk_bits,
            std::uint64_t first_element, const CodeTable& table, int threads, const EncodeTarget& target);

// Packs 5-bit values, first one in the most significant bits. gaps.size() is a multiple of 8, packed 5/8 of it.
void pack_gaps(std::span<const std::uint8_t> gaps, std::span<std::uint8_t> packed);

// The stored form of one unit. luts is [rows, 256], already validated: pointers lead to later tables, lengths <= 32.
struct EncodedUnit {
  std::span<const std::uint8_t> luts;
  std::span<const std::uint8_t> encoded;
  std::span<const std::uint8_t> sign_mantissa;
  std::span<const std::uint32_t> positions;  // [blocks + 1]
  std::span<const std::uint8_t> gaps;        // [320 * blocks]
};

// Decodes all weights into `words` (one per sign_mantissa byte). Throws CorruptData on any contradiction; never
// reads or writes outside the spans.
void decode(const EncodedUnit& unit, int threads, std::span<std::uint16_t> words);

}  // namespace bitforbit::df11
