// The families of oneDNN's orders: every implementation against the portable one, over encoded and plain matrices.
#include <algorithm>
#include <cstring>

#include "dispatch.hpp"
#include "linear.hpp"
#include "tests/amx_emulated.hpp"
#include "tests/check.hpp"
#include "tests/linear_emulated.hpp"
#include "tests/planes_cases.hpp"

namespace bitforbit::testing {
namespace {

struct Implementations {
  const LinearOps* portable;
  std::vector<const LinearOps*> others;
};

std::vector<Implementations> all_families() {
  std::vector<Implementations> families{
      {&kVdpbf16Scalar, {}}, {&kTdpbf16Scalar, {}}, {&kEmulatedScalar, {}}, {&kPairwiseScalar, {}}};
  for (Implementations& family : families) {
    for (const LinearOps* ops : linear_implementations()) {
      const bool same = std::string_view(ops->family) == family.portable->family && ops != family.portable;
      if (same && find_implementation(ops->isa) && (!ops->usable || ops->usable())) family.others.push_back(ops);
    }
  }
#if BITFORBIT_X86
  if (find_implementation("avx512")) families[3].others.push_back(&kPairwiseAvx512Vbmi2Emulated);
  if (find_implementation("avx512_vbmi2")) families[1].others.push_back(&kTdpbf16AmxEmulated);
  if (find_implementation("avx2")) CHECK(!families[0].others.empty());
#endif
  return families;
}

// Words of BF16 from bits, every NaN as one: which NaN it is depends on the order of operands.
ExactBytes one_nan(const ExactBytes& from) {
  ExactBytes to(from.span());
  for (std::size_t i = 0; i < to.size(); i += 2) {
    if ((to[i + 1] & 0x7f) == 0x7f && (to[i] > 0x80)) to[i] = 0xc0, to[i + 1] = 0x7f;
  }
  return to;
}

struct Inputs {
  Layout layout;
  ExactBytes weight, x;
  std::size_t tokens, k_block;
};

LinearArguments arguments(const Inputs& in, ExactBytes& out, int threads) {
  return {.x = in.x.data(),
          .x_f32 = false,
          .tokens = in.tokens,
          .out = out.data(),
          .bias = nullptr,
          .bias_f32 = false,
          .k_block = in.k_block,
          .threads = threads};
}

ExactBytes product(const Inputs& in, const PlanesParts* parts, const LinearOps& ops, int threads) {
  ExactBytes out(in.tokens * in.layout.rows * 2);
  const LinearArguments a = arguments(in, out, threads);
  if (parts) {
    linear(*parts, in.layout, a, ops);
  } else {
    linear_dense(in.weight.data(), in.layout.rows, in.layout.cols, a, ops);
  }
  return one_nan(out);
}

void check_products(Inputs in, const std::vector<Implementations>& families) {
  const EncodedPlanes encoded = encode_planes(in.weight.data(), in.layout, kPlanesScalar, 1);
  in.layout.rows_per_table = encoded.rows_per_table;
  const ExactParts parts(encoded), odd_parts(encoded, 1);
  const PlanesParts view = parts.view(), odd_view = odd_parts.view();
  for (const Implementations& family : families) {
    const ExactBytes expected = product(in, nullptr, *family.portable, 1);
    const std::string what = std::string(family.portable->family) + " " + std::to_string(in.layout.rows) + " x " +
                             std::to_string(in.layout.cols) + ", tokens " + std::to_string(in.tokens) + ", k_block " +
                             std::to_string(in.k_block) + " on ";
    CHECK_SAME_BYTES(expected.span(), product(in, &view, *family.portable, 1).span(), what + "scalar");
    for (const LinearOps* ops : family.others) {
      CHECK_SAME_BYTES(expected.span(), product(in, &view, *ops, 1).span(), what + ops->isa);
      CHECK_SAME_BYTES(expected.span(), product(in, &odd_view, *ops, 2).span(), what + ops->isa + ", unaligned");
      CHECK_SAME_BYTES(expected.span(), product(in, nullptr, *ops, 1).span(), what + ops->isa + ", dense");
    }
  }
}

Inputs make_inputs(Shape shape, std::size_t tokens, std::size_t k_block, Pattern pattern, Random& random) {
  const Layout layout{Kind::kBF16, false, shape.rows, shape.cols, 0};
  const Layout x_layout{Kind::kBF16, false, tokens, shape.cols, 0};
  return {layout, make_floats(kKinds[0], layout, pattern, random), make_floats(kKinds[0], x_layout, pattern, random),
          tokens, k_block};
}

}  // namespace

TEST(ordered_families_agree) {
  const auto families = all_families();
  Random random(11);
  for (const Shape shape : {Shape{16, 64}, Shape{32, 192}, Shape{16, 640}, Shape{1, 1}, Shape{17, 65}, Shape{5, 97},
                            Shape{40, 130}, Shape{16, 31}}) {
    for (const Pattern pattern : {Pattern::kNarrow, Pattern::kRandomBits, Pattern::kNineApart}) {
      for (const std::size_t tokens : {1, 2, 7, 16, 17}) {
        for (const std::size_t k_block : {0, 32, 100}) {
          check_products(make_inputs(shape, tokens, k_block, pattern, random), families);
        }
      }
    }
  }
}

TEST(ordered_damaged_digits) {
  // Whatever the digits say: an error or some result, and no access outside of the parts (AddressSanitizer looks).
  const auto families = all_families();
  Random random(12);
  for (const Shape shape : {Shape{16, 64}, Shape{32, 256}, Shape{19, 100}}) {
    Inputs in = make_inputs(shape, 8, 0, Pattern::kNarrow, random);
    const EncodedPlanes encoded = encode_planes(in.weight.data(), in.layout, kPlanesScalar, 1);
    in.layout.rows_per_table = encoded.rows_per_table;
    for (int round = 0; round < 60; ++round) {
      ExactParts parts(encoded);
      ExactBytes& part = round % 3 == 0 ? parts.tails : parts.digits;
      const std::size_t damage = 1 + random.below(part.size());
      for (std::size_t i = 0; i < damage; ++i) {
        part[random.below(part.size())] = static_cast<std::uint8_t>(round % 2 ? 0xff : random.bits());
      }
      const PlanesParts view = parts.view();
      for (const Implementations& family : families) {
        for (const LinearOps* ops : family.others) {
          try {
            product(in, &view, *ops, 1);
          } catch (const CorruptData&) {
          }
        }
      }
    }
  }
}

}  // namespace bitforbit::testing
