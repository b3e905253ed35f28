// The DF11 codec: round trips over sizes, codes, chunks and threads, and damaged units.
#include "df11.hpp"

#include <cstdio>
#include <cstdlib>
#include <optional>

#include "errors.hpp"
#include "tests/check.hpp"
#include "tests/df11_cases.hpp"

namespace bitforbit::testing {
namespace {

// Random signs and mantissas; exponents fall off from 120 downwards, or are spread over all 240.
std::vector<std::uint16_t> make_words(std::size_t size, bool spread, Random& random) {
  std::vector<std::uint16_t> words(size);
  for (std::uint16_t& word : words) {
    const std::size_t exponent =
        spread ? random.below(240) : 120 - static_cast<std::size_t>(__builtin_ctzll(random.bits() | 1ull << 31));
    word = static_cast<std::uint16_t>((random.bits() & 0x807f) | exponent << 7);
  }
  return words;
}

std::span<const std::uint8_t> bytes(const std::vector<std::uint16_t>& words) {
  return {reinterpret_cast<const std::uint8_t*>(words.data()), 2 * words.size()};
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

int rounds() {
  const char* text = std::getenv("BITFORBIT_TEST_ROUNDS");
  return text ? std::atoi(text) : 40;
}

}  // namespace

TEST(df11_round_trips) {
  Random random(11);
  for (const std::size_t size : {1, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 16384, 20000, 140000}) {
    for (const CodeShape shape : {CodeShape::kFlat, CodeShape::kSkewed}) {
      const std::vector<std::uint16_t> words = make_words(size, shape == CodeShape::kFlat, random);
      for (const std::size_t chunk : {std::size_t{100}, std::size_t{4096}, size}) {
        const int threads = 1 + static_cast<int>(random.below(4));
        const Df11Case unit = encode_df11(words, shape, chunk, threads);
        const Df11Case same = encode_df11(words, shape, size, 1);
        CHECK_SAME_BYTES(same.encoded, unit.encoded, "stream of " + std::to_string(size) + " weights");
        CHECK_SAME_BYTES(same.gaps, unit.gaps, "gaps of " + std::to_string(size) + " weights");
        CHECK(same.positions == unit.positions);
        for (int t = 1; t <= 4; ++t) {
          const auto got = try_decode(unit, t);
          CHECK(got.has_value());
          CHECK_SAME_BYTES(bytes(words), bytes(*got), std::to_string(size) + " weights");
        }
      }
    }
  }
}

TEST(df11_no_weights) {
  Df11Case unit;
  unit.luts.assign(512, 0);
  unit.positions = {0};
  CHECK(try_decode(unit, 2).has_value());
}

TEST(df11_wrong_sizes) {
  Random random(12);
  const Df11Case unit = encode_df11(make_words(20000, false, random), CodeShape::kSkewed, 1000, 1);
  for (int array = 0; array < 5; ++array) {
    for (const int change : {-1, 1}) {
      Df11Case wrong = unit;
      const auto resize = [&](auto& v) {
        v.resize(v.size() + static_cast<std::size_t>(change));
        v.shrink_to_fit();
      };
      std::vector<std::uint16_t> words(wrong.sign_mantissa.size());
      switch (array) {
        case 0: resize(wrong.luts); break;
        case 1: resize(wrong.encoded); break;
        case 2: resize(wrong.sign_mantissa); break;
        case 3: resize(wrong.gaps); break;
        default: resize(wrong.positions); break;
      }
      CHECK_THROWS(CorruptData, df11::decode(wrong.view(), 2, words));
    }
  }
}

TEST(df11_damaged_units) {
  Random random(13);
  int refused = 0, decoded = 0;
  for (const std::size_t size : {65, 4096, 30000}) {
    for (const CodeShape shape : {CodeShape::kFlat, CodeShape::kSkewed}) {
      const Df11Case unit = encode_df11(make_words(size, shape == CodeShape::kFlat, random), shape, 4096, 1);
      for (int round = 0; round < 5 * rounds(); ++round) {
        Df11Case damaged = unit;
        for (std::size_t flips = 1 + random.below(3); flips; --flips) {
          const std::uint8_t flip = static_cast<std::uint8_t>(1u << random.below(8));
          switch (random.below(4)) {
            case 0: damaged.luts[random.below(damaged.luts.size())] ^= flip; break;
            case 1: damaged.encoded[random.below(damaged.encoded.size())] ^= flip; break;
            case 2: damaged.gaps[random.below(damaged.gaps.size())] ^= flip; break;
            default:
              damaged.positions[random.below(damaged.positions.size())] ^= static_cast<std::uint32_t>(flip)
                                                                           << random.below(25);
              break;
          }
        }
        const auto one = try_decode(damaged, 1), three = try_decode(damaged, 3);
        CHECK(one.has_value() == three.has_value());
        if (one) CHECK(*one == *three);
        ++(one ? decoded : refused);
      }
    }
  }
  std::printf("     %d damaged units refused, %d decoded to something\n", refused, decoded);
  CHECK(refused > 0 && decoded > 0);
}

}  // namespace bitforbit::testing
