// df11::decode on units that a fuzzer makes up: it must refuse them with CorruptData or decode them, the same way with
// every number of threads, and touch nothing outside the unit and the output.
//
// Input: mode and number of weights; then, by mode,
//   raw      number of tables, stream length, tables, positions, stream, gaps,
//   damaged  BF16 words to encode (exponents below 240), and changes to the encoded unit.
#include <cstdlib>
#include <optional>
#include <vector>

#include "df11.hpp"
#include "errors.hpp"
#include "fuzz/input.hpp"
#include "tests/df11_cases.hpp"

namespace bitforbit::fuzz {
namespace {

using testing::CodeShape;
using testing::Df11Case;

Df11Case damaged_unit(Input& in, std::size_t weights) {
  const CodeShape shape = in.byte() % 2 ? CodeShape::kFlat : CodeShape::kSkewed;
  // A pattern of words, repeated: a small input gives units of several blocks.
  std::vector<std::uint8_t> pattern(1 + in.byte());
  in.fill(pattern);
  std::vector<std::uint16_t> words(weights);
  for (std::size_t i = 0; i < words.size(); ++i) {
    const unsigned b = pattern[i % pattern.size()];
    const unsigned exponent = shape == CodeShape::kFlat ? b % 240 : b % testing::kMaxSkewedSymbols;
    words[i] = static_cast<std::uint16_t>(exponent << 7 | (b * 37 & 0x7f));
  }
  Df11Case unit = testing::encode_df11(words, shape, 1000, 1);
  while (!in.empty()) {
    const std::uint8_t which = in.byte();
    const std::size_t at = in.u16();
    const std::uint8_t flip = in.byte();
    if (which % 4 == 3) {
      unit.positions[at % unit.positions.size()] ^= static_cast<std::uint32_t>(flip) << (which / 4 % 25);
      continue;
    }
    std::vector<std::uint8_t>& bytes = which % 4 == 0 ? unit.luts : which % 4 == 1 ? unit.encoded : unit.gaps;
    if (!bytes.empty()) bytes[at % bytes.size()] ^= flip;
  }
  return unit;
}

Df11Case raw_unit(Input& in, std::size_t weights) {
  Df11Case unit;
  unit.luts.resize(256 * (1 + in.byte() % 18));
  unit.encoded.resize(in.range(0, 3 * df11::kBlockBytes));
  in.fill(unit.luts);
  const std::size_t blocks = (unit.encoded.size() + df11::kBlockBytes - 1) / df11::kBlockBytes;
  for (std::size_t b = 0; b < blocks; ++b) unit.positions.push_back(static_cast<std::uint32_t>(b ? in.u16() : 0));
  unit.positions.push_back(static_cast<std::uint32_t>(weights));
  unit.positions.shrink_to_fit();
  in.fill(unit.encoded);
  unit.gaps.resize(blocks * df11::kGapBytesPerBlock);
  in.fill(unit.gaps);
  unit.sign_mantissa.resize(weights);
  return unit;
}

std::optional<std::vector<std::uint16_t>> try_decode(const Df11Case& unit, int threads) {
  std::vector<std::uint16_t> words(unit.sign_mantissa.size());
  try {
    df11::decode(unit.view(), threads, words);
  } catch (const CorruptData&) {
    return std::nullopt;
  }
  return words;
}

void run(Input in) {
  const bool damaged = in.byte() % 4 != 0;
  const std::size_t weights = in.range(1, 30000);
  const Df11Case unit = damaged ? damaged_unit(in, weights) : raw_unit(in, weights);
  if (try_decode(unit, 1) != try_decode(unit, 2)) std::abort();
}

}  // namespace
}  // namespace bitforbit::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  bitforbit::fuzz::run({data, size});
  return 0;
}
