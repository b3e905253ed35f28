// decode_planes and linear on parts that a fuzzer makes up. They must refuse them with CorruptData or take them, the
// same way on every instruction set, and touch nothing outside the parts and the output. Products must be those of what
// is decoded.
//
// Input: kind, mode, rows, cols, rows per table, first and last row; then, by mode,
//   raw      the parts' bytes one after the other; `tails` gets the length that the counts in `code` ask for,
//   sizes    the same with all four lengths from the input,
//   damaged  floats to encode, and changes to the encoded parts.
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.hpp"
#include "errors.hpp"
#include "fuzz/input.hpp"
#include "linear.hpp"
#include "planes.hpp"

namespace bitforbit::fuzz {
namespace {

constexpr std::size_t kMaxTails = 1 << 20;

// Exactly as long as the parts, so that AddressSanitizer sees reads past their end (a vector may hold more).
struct Part {
  explicit Part(std::size_t size) : bytes(new std::uint8_t[size]), size(size) {}
  std::span<std::uint8_t> span() { return {bytes.get(), size}; }
  std::unique_ptr<std::uint8_t[]> bytes;
  std::size_t size;
};

std::size_t pad64(std::size_t n) { return (n + 63) / 64 * 64; }

// Bytes of the tails by the counts in `code`, or 0 where they are too large to try.
std::size_t tails_by_counts(std::span<const std::uint8_t> code, const Layout& layout) {
  std::size_t total = 0;
  for (std::size_t i = 0; i < layout.blocks(); ++i) {
    std::uint32_t n[3];
    std::memcpy(n, code.data() + layout.tables() * kTableBytes + i * kIndexBytes, sizeof n);
    total += (std::size_t{n[0]} + 63) / 64 * 16 + (std::size_t{n[1]} + 63) / 64 * 16 + n[2];
    if (total > kMaxTails) return 0;
  }
  return pad64(total);
}

struct Parts {
  Part code, digits, sign_mantissa, tails;
  PlanesParts view() { return {code.span(), digits.span(), sign_mantissa.span(), tails.span()}; }
};

Part copy(const Buffer& buffer) {
  Part part(buffer.size());
  if (buffer.size()) std::memcpy(part.bytes.get(), buffer.data(), buffer.size());
  return part;
}

Parts damaged_parts(Input& in, Layout& layout) {
  Part floats(layout.rows * layout.row_bytes());
  in.fill(floats.span());
  const EncodedPlanes encoded = encode_planes(floats.bytes.get(), layout, kPlanesScalar, 1);
  layout.rows_per_table = encoded.rows_per_table;
  Parts parts{copy(encoded.code), copy(encoded.digits), copy(encoded.sign_mantissa), copy(encoded.tails)};
  return parts;
}

Parts raw_parts(Input& in, const Layout& layout, bool sizes) {
  Part code(sizes ? in.u16() : layout.code_bytes());
  in.fill(code.span());
  const std::size_t digits_bytes = sizes ? in.u16() : layout.digits_bytes();
  const std::size_t rest_bytes = sizes ? in.u16() : layout.sign_mantissa_bytes();
  const std::size_t tails_bytes = sizes ? in.u16() : tails_by_counts(code.span(), layout);
  Parts parts{std::move(code), Part(digits_bytes), Part(rest_bytes), Part(tails_bytes)};
  for (Part* part : {&parts.digits, &parts.tails, &parts.sign_mantissa}) in.fill(part->span());
  return parts;
}

void change(Input& in, Parts& parts) {
  Part* all[] = {&parts.code, &parts.digits, &parts.tails, &parts.sign_mantissa};
  while (!in.empty()) {
    Part& part = *all[in.byte() % 4];
    const std::size_t at = in.u16();
    const std::uint8_t flip = in.byte();
    if (part.size) part.bytes[at % part.size] ^= flip;
  }
}

std::optional<std::vector<std::uint8_t>> try_decode(Parts& parts, const Layout& layout, std::size_t begin,
                                                    std::size_t end, const PlanesOps& ops, int threads) {
  Part out((end - begin) * layout.row_bytes());
  try {
    decode_planes(parts.view(), layout, begin, end, out.bytes.get(), ops, threads);
  } catch (const CorruptData&) {
    return std::nullopt;
  }
  return std::vector<std::uint8_t>(out.bytes.get(), out.bytes.get() + out.size);
}

void check_products(Parts& parts, const Layout& layout, std::size_t tokens) {
  const auto decoded = try_decode(parts, layout, 0, layout.rows, kPlanesScalar, 1);
  Part x(tokens * layout.cols * 2);
  for (std::size_t i = 0; i < x.size; ++i) x.bytes[i] = i % 2 ? 0x3f : static_cast<std::uint8_t>(i);
  for (const LinearOps* ops : linear_implementations()) {
    if (!find_implementation(ops->isa) || !ops->bf16 || (ops->usable && !ops->usable())) continue;
    Part out(tokens * layout.rows * 2), expected(out.size);
    LinearArguments a{x.bytes.get(), false, tokens, out.bytes.get(), nullptr, false, 0, 1};
    bool refused = false;
    try {
      linear(parts.view(), layout, a, *ops);
    } catch (const CorruptData&) {
      refused = true;
    }
    if (refused == decoded.has_value()) std::abort();
    if (refused) continue;
    a.out = expected.bytes.get();
    linear_dense(decoded->data(), layout.rows, layout.cols, a, *ops);
    if (std::memcmp(out.bytes.get(), expected.bytes.get(), out.size) != 0) std::abort();
  }
}

void run(Input in) {
  const std::uint8_t kind = in.byte() % 6;
  const std::uint8_t mode = in.byte() % 4;
  Layout layout{kind < 5 ? static_cast<Kind>(kind) : Kind::kBF16, kind == 5, in.range(1, 70), in.range(1, 400), 0};
  layout.rows_per_table = kBlockRows * in.range(1, 6);
  const std::size_t begin = in.range(0, layout.rows), end = in.range(begin, layout.rows);

  Parts parts = mode >= 2 ? damaged_parts(in, layout) : raw_parts(in, layout, mode == 1);
  if (mode >= 2) change(in, parts);
  const auto expected = try_decode(parts, layout, begin, end, kPlanesScalar, 1);
  for (const Implementation& i : implementations()) {
    if (i.supported && try_decode(parts, layout, begin, end, *i.planes, 1) != expected) std::abort();
  }
  if (layout.kind == Kind::kBF16 && !layout.wide) check_products(parts, layout, 1 + layout.rows % 2);
}

}  // namespace
}  // namespace bitforbit::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  bitforbit::fuzz::run({data, size});
  return 0;
}
