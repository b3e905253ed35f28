// How each float kind is split into exponent bytes and sign+mantissa planes, and joined again: 64 elements at a time.
//
// V is the vector interface of one instruction set (isa/*/vector.hpp). V::B holds 64 bytes in plane order.
#pragma once

#include "planes_block.hpp"

namespace bitforbit {
namespace {

// Bytes per group of each plane, lowest bits first (docs/format.md, section 3).
constexpr std::size_t plane_stride(Kind kind, int plane) {
  switch (kind) {
    case Kind::kBF16: return plane == 0 ? 64 : 0;
    case Kind::kF16: return plane == 0 ? 64 : plane == 1 ? 16 : 8;
    case Kind::kF32: return 64;
    case Kind::kF8E4M3: return plane == 0 ? 32 : 0;
    case Kind::kF8E5M2: return plane == 0 ? 16 : plane == 1 ? 8 : 0;
  }
  return 0;
}

constexpr std::size_t item_size(Kind kind, bool wide) {
  if (kind == Kind::kF32 || wide) return 4;
  return kind == Kind::kBF16 || kind == Kind::kF16 ? 2 : 1;
}

// Joins 64 exponents with the sign and mantissa of group g and stores the floats in natural order.
template <class V, Kind K, bool Wide>
inline void join64(typename V::B e, const std::uint8_t* const planes[], std::size_t g, std::uint8_t* out) {
  using B = typename V::B;
  if constexpr (K == Kind::kBF16 || K == Kind::kF32) {
    // top plane: [7] sign, [6:0] upper mantissa; high byte of the float: [7] sign, [6:0] exponent[7:1].
    const B top = V::load(planes[K == Kind::kF32 ? 2 : 0] + 64 * g);
    const B low = V::select(0x7f, top, V::template shl<7>(e));
    const B high = V::select(0x80, top, V::template shr<1>(e));
    if constexpr (K == Kind::kF32) {
      V::store32(out, V::load(planes[0] + 64 * g), V::load(planes[1] + 64 * g), low, high);
    } else if constexpr (Wide) {
      V::store32(out, V::zero(), V::zero(), low, high);
    } else {
      V::store16(out, low, high);
    }
  } else if constexpr (K == Kind::kF16) {
    // high byte: [7] sign, [6:2] exponent, [1:0] mantissa[9:8].
    const B two = V::unpack2(planes[1] + 16 * g);
    const B sign = V::template shl<7>(V::unpack1(planes[2] + 8 * g));
    const B high = V::or3(V::and_byte(V::template shl<2>(e), 0x7c), two, sign);
    V::store16(out, V::load(planes[0] + 64 * g), high);
  } else if constexpr (K == Kind::kF8E4M3) {
    // nibble: [3] sign, [2:0] mantissa; byte: [7] sign, [6:3] exponent, [2:0] mantissa.
    const B nibble = V::unpack4(planes[0] + 32 * g);
    const B sign = V::and_byte(V::template shl<4>(nibble), 0x80);
    const B mantissa = V::and_byte(nibble, 0x07);
    V::store8(out, V::or3(V::and_byte(V::template shl<3>(e), 0x78), mantissa, sign));
  } else {
    // byte: [7] sign, [6:2] exponent, [1:0] mantissa.
    const B mantissa = V::unpack2(planes[0] + 16 * g);
    const B sign = V::template shl<7>(V::unpack1(planes[1] + 8 * g));
    V::store8(out, V::or3(V::and_byte(V::template shl<2>(e), 0x7c), mantissa, sign));
  }
}

// Fills a group with the float of exponent `exponent` whose sign and mantissa are zero.
template <Kind K, bool Wide>
inline void fill_rank0(std::uint8_t* buffer, std::uint8_t exponent) {
  constexpr std::size_t kItem = item_size(K, Wide);
  constexpr int kShift = K == Kind::kBF16     ? (Wide ? 23 : 7)
                         : K == Kind::kF16    ? 10
                         : K == Kind::kF32    ? 23
                         : K == Kind::kF8E4M3 ? 3
                                              : 2;
  const std::uint32_t word = static_cast<std::uint32_t>(exponent) << kShift;
  for (std::size_t i = 0; i < kGroup * kItem; ++i) {
    buffer[i] = static_cast<std::uint8_t>(word >> (8 * (i % kItem)));
  }
}

// Splits 64 floats in natural order into exponents (returned) and the planes of group g.
template <class V, Kind K, bool Wide>
inline typename V::B split64(const std::uint8_t* src, std::uint8_t* const planes[], std::size_t g) {
  using B = typename V::B;
  if constexpr (K == Kind::kBF16 || K == Kind::kF32) {
    B b0, b1, low, high;
    if constexpr (K == Kind::kF32 || Wide) {
      V::load32(src, b0, b1, low, high);
    } else {
      V::load16(src, low, high);
    }
    const B top = V::select(0x80, high, low);
    V::store(planes[K == Kind::kF32 ? 2 : 0] + 64 * g, top);
    if constexpr (K == Kind::kF32) {
      V::store(planes[0] + 64 * g, b0);
      V::store(planes[1] + 64 * g, b1);
    }
    return V::or2(V::template shl<1>(high), V::template shr<7>(low));
  } else if constexpr (K == Kind::kF16) {
    B low, high;
    V::load16(src, low, high);
    V::store(planes[0] + 64 * g, low);
    V::pack2(planes[1] + 16 * g, V::and_byte(high, 0x03));
    V::pack1(planes[2] + 8 * g, high);
    return V::and_byte(V::template shr<2>(high), 0x1f);
  } else if constexpr (K == Kind::kF8E4M3) {
    const B byte = V::load(src);
    V::pack4(planes[0] + 32 * g, V::select(0x07, byte, V::and_byte(V::template shr<4>(byte), 0x08)));
    return V::and_byte(V::template shr<3>(byte), 0x0f);
  } else {
    const B byte = V::load(src);
    V::pack2(planes[0] + 16 * g, V::and_byte(byte, 0x03));
    V::pack1(planes[1] + 8 * g, byte);
    return V::and_byte(V::template shr<2>(byte), 0x1f);
  }
}

}  // namespace
}  // namespace bitforbit
