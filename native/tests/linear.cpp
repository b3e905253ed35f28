// Products: every implementation against the portable one of its family, over hostile weights and damaged parts.
#include "linear.hpp"

#include <cstring>
#include <optional>

#include "tests/check.hpp"
#include "tests/linear_emulated.hpp"
#include "tests/planes_cases.hpp"

namespace bitforbit::testing {
namespace {

const KindCase& kBf16 = kKinds[0];

// Every implementation that this CPU can run, the emulated ones too; the portable one of each family first.
std::vector<const LinearOps*> usable_linear() {
  std::vector<const LinearOps*> usable;
  for (const LinearOps* ops : linear_implementations()) {
    if (find_implementation(ops->isa) && (!ops->usable || ops->usable())) usable.push_back(ops);
  }
#if BITFORBIT_X86
  if (find_implementation("avx512")) {
    usable.push_back(&kLanesAvx512Vbmi2Emulated);
    usable.push_back(&kLanesAvx512Bf16Emulated);
  }
#endif
  return usable;
}

const LinearOps& portable(const LinearOps& ops) {
  const LinearOps* found = find_linear(ops.family, "scalar", !ops.bf16);
  if (!found) fail(__FILE__, __LINE__, std::string("no portable implementation of ") + ops.family);
  return *found;
}

struct Case {
  Layout layout;
  ExactBytes weight;
  EncodedPlanes encoded;
  ExactBytes x, bias;
  bool f32, with_bias;
  std::size_t tokens, k_block;

  Case(Shape shape, Pattern pattern, std::size_t t, bool wide_x, bool biased, std::size_t block, Random& random)
      : layout{Kind::kBF16, false, shape.rows, shape.cols, 0},
        weight(make_floats(kBf16, layout, pattern, random)),
        encoded(encode_planes(weight.data(), layout, kPlanesScalar, 1)),
        x(t * shape.cols * (wide_x ? 4 : 2), 1),
        bias(biased ? shape.rows * 2 : 0, 1),
        f32(wide_x),
        with_bias(biased),
        tokens(t),
        k_block(block) {
    layout.rows_per_table = encoded.rows_per_table;
    fill(x, wide_x ? kKinds[3] : kBf16, pattern, random);
    fill(bias, kBf16, Pattern::kNarrow, random);
  }
  static void fill(ExactBytes& bytes, const KindCase& c, Pattern pattern, Random& random) {
    for (std::size_t i = 0; i < bytes.size() / (static_cast<std::size_t>(c.item_bits) / 8); ++i)
      put_word(c, bytes.data(), i, make_word(c, pattern, random));
  }

  // `parts` nullptr: from the plain weights. NaNs come out as one and the same.
  ExactBytes run(const LinearOps& ops, const ExactParts* parts, int threads) const {
    ExactBytes out(tokens * layout.rows * (f32 ? 4 : 2), 1);
    std::fill_n(out.data(), out.size(), std::uint8_t{0xa5});
    const LinearArguments a{x.data(), f32,     tokens, out.data(), with_bias ? bias.data() : nullptr,
                            false,    k_block, threads};
    if (parts) {
      linear(parts->view(), layout, a, ops);
    } else {
      linear_dense(weight.data(), layout.rows, layout.cols, a, ops);
    }
    // Which NaN it is depends on the order of operands.
    for (std::size_t i = 0; f32 && i < out.size(); i += 4) {
      std::uint32_t word;
      std::memcpy(&word, out.data() + i, 4);
      if ((word & 0x7fffffff) > 0x7f800000) word = 0x7fc00000;
      std::memcpy(out.data() + i, &word, 4);
    }
    for (std::size_t i = 0; !f32 && i < out.size(); i += 2) {
      std::uint16_t word;
      std::memcpy(&word, out.data() + i, 2);
      if ((word & 0x7fff) > 0x7f80) word = 0x7fc0;
      std::memcpy(out.data() + i, &word, 2);
    }
    return out;
  }
  std::string describe(const LinearOps& ops) const {
    return std::string(ops.family) + " on " + ops.isa + ", " + std::to_string(layout.rows) + " x " +
           std::to_string(layout.cols) + ", " + std::to_string(tokens) + " tokens of " + (f32 ? "F32" : "BF16") +
           (with_bias ? ", bias" : "") + ", K blocks of " + std::to_string(k_block);
  }
};

}  // namespace

TEST(linear_products) {
  Random random(11);
  std::string names;
  for (const LinearOps* ops : usable_linear()) names += std::string(" ") + ops->family + "/" + ops->isa;
  std::printf("     products:%s\n", names.c_str());
  constexpr Shape kMatrices[] = {{1, 1}, {3, 31}, {17, 64}, {16, 97}, {33, 130}, {5, 1200}, {16, 640}};
  int round = 0;
  for (const Shape shape : kMatrices) {
    for (const Pattern pattern : {Pattern::kZero, Pattern::kNarrow, Pattern::kRandomBits}) {
      for (const std::size_t tokens : {1, 2, 7}) {
        ++round;
        const std::size_t k_block = round % 3 == 0 ? 96 : 0;
        for (const bool f32 : {false, true}) {
          const Case c(shape, pattern, tokens, f32, round % 2, k_block, random);
          const ExactParts parts(c.encoded, static_cast<std::size_t>(round % 2));
          for (const LinearOps* ops : usable_linear()) {
            if (!(f32 ? ops->f32 : ops->bf16)) continue;
            const ExactBytes expected = c.run(portable(*ops), nullptr, 1);
            CHECK_SAME_BYTES(expected.span(), c.run(*ops, &parts, 1 + round % 3).span(), c.describe(*ops));
            CHECK_SAME_BYTES(expected.span(), c.run(*ops, nullptr, 1).span(), c.describe(*ops) + ", plain");
          }
        }
      }
    }
  }
}

TEST(linear_damaged_parts) {
  Random random(12);
  int refused = 0, multiplied = 0;
  for (int round = 0; round < 150; ++round) {
    const Shape shape = round % 3 == 0 ? Shape{17, 130} : round % 3 == 1 ? Shape{40, 64} : Shape{3, 500};
    Case c(shape, round % 2 ? Pattern::kNarrow : Pattern::kRandomBits, 1 + round % 4, false, false, 0, random);
    ExactParts parts(c.encoded);
    ExactBytes* targets[] = {&parts.code, &parts.digits, &parts.tails, &parts.sign_mantissa};
    for (std::size_t flips = 1 + random.below(4); flips; --flips) {
      ExactBytes& target = *targets[random.below(4)];
      if (target.size()) target[random.below(target.size())] ^= static_cast<std::uint8_t>(1u << random.below(8));
    }
    bool decodes = true;
    try {
      decode_planes(parts.view(), c.layout, 0, c.layout.rows, c.weight.data(), kPlanesScalar, 1);
    } catch (const CorruptData&) {
      decodes = false;
    }
    ++(decodes ? multiplied : refused);
    for (const LinearOps* ops : usable_linear()) {
      if (!ops->bf16) continue;
      if (decodes) {
        CHECK_SAME_BYTES(c.run(*ops, nullptr, 1).span(), c.run(*ops, &parts, 2).span(), c.describe(*ops) + ", damaged");
      } else {
        CHECK_THROWS(CorruptData, c.run(*ops, &parts, 2));
      }
    }
  }
  std::printf("     %d damaged matrices refused, %d multiplied\n", refused, multiplied);
  CHECK(refused > 0 && multiplied > 0);
}

TEST(linear_wrong_sizes) {
  Random random(13);
  const Case c({33, 130}, Pattern::kNarrow, 2, false, false, 0, random);
  for (const LinearOps* ops : usable_linear()) {
    if (!ops->bf16) continue;
    for (int part = 0; part < 4; ++part) {
      const ExactParts parts(c.encoded);
      PlanesParts view = parts.view();
      std::span<const std::uint8_t>* sizes[] = {&view.code, &view.digits, &view.sign_mantissa, &view.tails};
      const ExactBytes cut(sizes[part]->first(random.below(sizes[part]->size())));
      *sizes[part] = cut.span();
      ExactBytes out(2 * c.tokens * c.layout.rows);
      const LinearArguments a{c.x.data(), false, c.tokens, out.data(), nullptr, false, 0, 2};
      CHECK_THROWS(CorruptData, linear(view, c.layout, a, *ops));
    }
  }
}

}  // namespace bitforbit::testing
