// The planes codec over whole matrices: every float kind on every instruction set, and damaged parts.
#include "planes.hpp"

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "errors.hpp"
#include "planes_tables.hpp"
#include "tests/check.hpp"
#include "tests/planes_cases.hpp"

namespace bitforbit::testing {
namespace {

ExactBytes decode(const ExactParts& parts, const Layout& layout, std::size_t begin, std::size_t end,
                  const PlanesOps& ops, int threads, std::size_t shift = 0) {
  ExactBytes out((end - begin) * layout.row_bytes(), shift);
  std::fill_n(out.data(), out.size(), std::uint8_t{0xa5});
  decode_planes(parts.view(), layout, begin, end, out.data(), ops, threads);
  return out;
}

void check_same_parts(const EncodedPlanes& expected, const EncodedPlanes& got, const std::string& what) {
  CHECK(expected.rows_per_table == got.rows_per_table);
  CHECK_SAME_BYTES(ExactParts::bytes(expected.code), ExactParts::bytes(got.code), what + ", code");
  CHECK_SAME_BYTES(ExactParts::bytes(expected.digits), ExactParts::bytes(got.digits), what + ", digits");
  CHECK_SAME_BYTES(ExactParts::bytes(expected.sign_mantissa), ExactParts::bytes(got.sign_mantissa),
                   what + ", sign_mantissa");
  CHECK_SAME_BYTES(ExactParts::bytes(expected.tails), ExactParts::bytes(got.tails), what + ", tails");
}

// Encodes on every instruction set, which must give the same parts, and decodes them back, whole and by row ranges.
void check_round_trip(const KindCase& c, Layout layout, const ExactBytes& data, Random& random) {
  const std::vector<const PlanesOps*> usable = usable_ops();
  const EncodedPlanes reference = encode_planes(data.data(), layout, *usable[0], 1);
  Layout coded = layout;
  coded.rows_per_table = reference.rows_per_table;
  CHECK(coded.rows_per_table % kBlockRows == 0);
  CHECK(reference.code.size() % 64 == 0 && reference.digits.size() % 64 == 0);
  CHECK(reference.sign_mantissa.size() % 64 == 0 && reference.tails.size() % 64 == 0);
  const ExactParts parts(reference), odd_parts(reference, 1);
  int threads = 1;
  for (const PlanesOps* ops : usable) {
    const std::string what = describe(c, layout, *ops);
    threads = threads % 4 + 1;
    check_same_parts(reference, encode_planes(data.data(), layout, *ops, threads), what + ", encoded");
    CHECK_SAME_BYTES(data.span(), decode(parts, coded, 0, coded.rows, *ops, threads).span(), what);
    CHECK_SAME_BYTES(data.span(), decode(odd_parts, coded, 0, coded.rows, *ops, 1, 1).span(), what + ", unaligned");
    for (int i = 0; i < 3; ++i) {
      const std::size_t begin = random.below(coded.rows + 1), end = begin + random.below(coded.rows - begin + 1);
      const auto expected = data.span().subspan(begin * coded.row_bytes(), (end - begin) * coded.row_bytes());
      CHECK_SAME_BYTES(expected, decode(parts, coded, begin, end, *ops, threads).span(),
                       what + ", rows " + std::to_string(begin) + " to " + std::to_string(end));
    }
  }
}

// Whole float formats, every word once, in several shapes.
void check_all_words(const KindCase& c, std::initializer_list<Shape> shapes) {
  Random random(7);
  for (const Shape shape : shapes) {
    CHECK(shape.rows * shape.cols == std::size_t{1} << c.item_bits);
    const Layout layout{c.kind, c.wide, shape.rows, shape.cols, 0};
    ExactBytes data(layout.rows * layout.row_bytes());
    for (std::size_t i = 0; i < shape.rows * shape.cols; ++i)
      put_word(c, data.data(), i, static_cast<std::uint32_t>(i));
    check_round_trip(c, layout, data, random);
  }
}

// What a decoder makes of parts: the floats, or nothing if it refuses them. Anything but CorruptData is a failure.
std::optional<ExactBytes> try_decode(const ExactParts& parts, const Layout& layout, const PlanesOps& ops, int threads) {
  try {
    return decode(parts, layout, 0, layout.rows, ops, threads);
  } catch (const CorruptData&) {
    return std::nullopt;
  }
}

// Rounds of random damage; BITFORBIT_TEST_ROUNDS changes their number.
int rounds() {
  const char* text = std::getenv("BITFORBIT_TEST_ROUNDS");
  return text ? std::atoi(text) : 40;
}

}  // namespace

TEST(planes_implementations) {
  CHECK(!implementations().empty() && implementations()[0].name == "scalar" && implementations()[0].supported);
  CHECK(find_implementation("scalar") && !find_implementation("abacus"));
  std::string names;
  for (const PlanesOps* ops : usable_ops()) names += std::string(" ") + ops->name;
  std::printf("     instruction sets:%s (the last one emulated if it comes twice)\n", names.c_str());
}

TEST(planes_round_trips) {
  Random random(1);
  for (const KindCase& c : kKinds) {
    for (const Shape shape : kShapes) {
      for (const Pattern pattern : kPatterns) {
        const Layout layout{c.kind, c.wide, shape.rows, shape.cols, 0};
        check_round_trip(c, layout, make_floats(c, layout, pattern, random, random.below(2)), random);
      }
    }
  }
}

TEST(planes_prescribed_tables) {
  Random random(2);
  for (const KindCase& c : kKinds) {
    for (const std::size_t rows_per_table : {16, 48, 1024}) {
      const Layout layout{c.kind, c.wide, 130, 70, rows_per_table};
      check_round_trip(c, layout, make_floats(c, layout, Pattern::kWide, random), random);
    }
  }
}

TEST(planes_many_tasks) {  // enough elements for several threads, and for sampled histograms
  Random random(3);
  for (const KindCase& c : {kKinds[0], kKinds[4]}) {
    const Layout layout{c.kind, c.wide, 403, 1000, 0};
    check_round_trip(c, layout, make_floats(c, layout, Pattern::kNarrow, random), random);
  }
}

TEST(planes_all_words) {
  check_all_words(kKinds[0], {{256, 256}, {1, 65536}, {65536, 1}});
  check_all_words(kKinds[1], {{256, 256}});
  check_all_words(kKinds[2], {{256, 256}, {1024, 64}});
  check_all_words(kKinds[4], {{16, 16}, {4, 64}, {256, 1}, {1, 256}});
  check_all_words(kKinds[5], {{16, 16}, {4, 64}, {256, 1}, {1, 256}});
}

TEST(planes_wrong_sizes) {
  Random random(4);
  const KindCase& c = kKinds[0];
  Layout layout{c.kind, c.wide, 33, 130, 0};
  const ExactBytes data = make_floats(c, layout, Pattern::kRandomBits, random);
  const EncodedPlanes encoded = encode_planes(data.data(), layout, kPlanesScalar, 1);
  layout.rows_per_table = encoded.rows_per_table;
  for (const PlanesOps* ops : usable_ops()) {
    for (int part = 0; part < 4; ++part) {
      for (int i = 0; i < 12; ++i) {
        const ExactParts parts(encoded);
        PlanesParts view = parts.view();
        std::span<const std::uint8_t>* sizes[] = {&view.code, &view.digits, &view.sign_mantissa, &view.tails};
        std::span<const std::uint8_t>& span = *sizes[part];
        const std::size_t keep = i == 0 ? 0 : i == 1 ? span.size() - 64 : random.below(span.size());
        const ExactBytes cut(span.first(keep));
        span = cut.span();
        ExactBytes out(layout.rows * layout.row_bytes());
        CHECK_THROWS(CorruptData, decode_planes(view, layout, 0, layout.rows, out.data(), *ops, 2));
      }
    }
  }
}

TEST(planes_damaged_parts) {
  Random random(5);
  int refused = 0, decoded = 0;
  for (const KindCase& c : kKinds) {
    for (const Shape shape : {Shape{1, 65}, Shape{17, 130}, Shape{40, 64}, Shape{3, 500}}) {
      for (const Pattern pattern : {Pattern::kNarrow, Pattern::kWide, Pattern::kRandomBits}) {
        Layout layout{c.kind, c.wide, shape.rows, shape.cols, 0};
        const ExactBytes data = make_floats(c, layout, pattern, random);
        const EncodedPlanes encoded = encode_planes(data.data(), layout, kPlanesScalar, 1);
        layout.rows_per_table = encoded.rows_per_table;
        for (int round = 0; round < rounds(); ++round) {
          ExactParts parts(encoded);
          ExactBytes* targets[] = {&parts.code, &parts.digits, &parts.tails, &parts.sign_mantissa};
          for (std::size_t flips = 1 + random.below(4); flips; --flips) {
            ExactBytes& target = *targets[random.below(4)];
            if (!target.size()) continue;
            // Damage both any byte and, as those matter most, low bits of the counts.
            const std::size_t at = random.below(target.size());
            target[at] ^= static_cast<std::uint8_t>(round % 2 ? 1 + random.below(255) : 1u << random.below(8));
          }
          const std::optional<ExactBytes> expected = try_decode(parts, layout, kPlanesScalar, 1);
          ++(expected ? decoded : refused);
          for (const PlanesOps* ops : usable_ops()) {
            const std::optional<ExactBytes> got = try_decode(parts, layout, *ops, 1 + round % 4);
            CHECK(got.has_value() == expected.has_value());
            if (got) CHECK_SAME_BYTES(expected->span(), got->span(), describe(c, layout, *ops) + ", damaged");
          }
        }
      }
    }
  }
  std::printf("     %d damaged matrices refused, %d decoded to something\n", refused, decoded);
  CHECK(refused > 0 && decoded > 0);
}

TEST(planes_histogram) {
  Random random(6);
  for (const KindCase& c : kKinds) {
    const Layout layout{c.kind, c.wide, 13, 77, 0};
    const ExactBytes data = make_floats(c, layout, Pattern::kRandomBits, random, 1);
    std::uint64_t expected[256] = {}, got[256] = {};
    for (std::size_t i = 0; i < layout.rows * layout.cols; ++i) {
      std::uint32_t word = 0;
      std::memcpy(&word, data.data() + i * layout.item_bytes(), layout.item_bytes());
      if (c.wide) word >>= 16;
      ++expected[word >> c.mantissa_bits & ((1u << c.exponent_bits) - 1)];
    }
    exponent_histogram(data.data(), layout.rows * layout.cols, c.kind, c.wide, got);
    CHECK(std::equal(expected, expected + 256, got));
  }
}

// An encoder that counts by the plan chooses what encode_planes chooses.
TEST(planes_tables_by_plan) {
  Random random(9);
  const KindCase& c = kKinds[0];
  for (const Shape shape : {Shape{1, 1}, {17, 130}, {200, 1000}, {130, 40000}, {1000, 64}}) {
    for (const std::size_t rows_per_table : {0, 16, 4096}) {
      const Layout layout{c.kind, c.wide, shape.rows, shape.cols, rows_per_table};
      const ExactBytes data = make_floats(c, layout, Pattern::kWide, random, 1);
      const HistogramPlan plan = plan_histograms(layout);
      std::vector<Histogram> histograms(plan.count, Histogram{});
      for (std::size_t row = 0; row < layout.rows; ++row) {
        const std::size_t h = row / plan.rows, stride = h + 1 < plan.count ? plan.stride : plan.last_stride;
        for (std::size_t col = 0; col < layout.cols; ++col) {
          // Rows are counted from the start of the matrix, not of the histogram.
          if (col / 64 % stride != row % stride) continue;
          std::uint16_t word;
          std::memcpy(&word, data.data() + 2 * (row * layout.cols + col), 2);
          ++histograms[h][word >> 7 & 255];
        }
      }
      const CodeTables chosen = choose_tables(std::move(histograms), layout);
      const EncodedPlanes encoded = encode_planes(data.data(), layout, kPlanesScalar, 1);
      CHECK(chosen.rows_per_table == encoded.rows_per_table);
      CHECK(std::equal(chosen.bytes.begin(), chosen.bytes.end(), encoded.code.data()));
    }
  }
}

TEST(planes_widened_bf16) {
  Random random(8);
  for (const std::size_t elements : {0, 1, 63, 4096, 4097, 10000}) {
    const Layout layout{Kind::kBF16, true, 1, elements, 0};
    ExactBytes data = make_floats(kKinds[1], layout, Pattern::kRandomBits, random, 1);
    CHECK(is_widened_bf16(data.data(), elements));
    if (!elements) continue;
    data[4 * (elements - 1) + 1] = 1;
    CHECK(!is_widened_bf16(data.data(), elements));
  }
}

}  // namespace bitforbit::testing
