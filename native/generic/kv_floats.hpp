// Numbers of a cache as FP32: plain loops that compilers vectorize for the instruction set of the file that includes
// this.
#pragma once

#include "kv_block.hpp"

namespace bitforbit {
namespace {

inline float float_of(std::uint32_t word) { return __builtin_bit_cast(float, word); }
inline std::uint32_t word_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }

inline float bf16_value(std::uint16_t bits) { return float_of(static_cast<std::uint32_t>(bits) << 16); }

inline float f16_value(std::uint16_t bits) {
  // [14:10] exponent, [9:0] mantissa, moved to [27:13] of a float and scaled: exact, subnormals too.
  const std::uint32_t magnitude = bits & 0x7fffu;
  const std::uint32_t finite = word_of(float_of(magnitude << 13) * 0x1p112f);
  const std::uint32_t infinite = magnitude << 13 | 0x7f800000u;
  return float_of((magnitude >= 0x7c00u ? infinite : finite) | (bits & 0x8000u) << 16);
}

inline std::uint16_t bf16_nearest(float x) {
  const std::uint32_t word = word_of(x);
  if (x != x) return 0x7fc0;
  return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

inline std::uint16_t f16_nearest(float x) {
  const std::uint32_t word = word_of(x), magnitude = word & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>(word >> 16 & 0x8000u);
  if (x != x) return 0x7e00;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // from 65520 on
  if (magnitude < 0x38800000u) {  // subnormal: adding 2^-1 leaves multiples of 2^-24 in the low bits
    return static_cast<std::uint16_t>(sign | (word_of(float_of(magnitude) + 0.5f) & 0xffffu));
  }
  return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline std::uint16_t load16(const std::uint8_t* p) {
  std::uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return bits;
}

template <KvDtype kDtype>
inline float load_value(const std::uint8_t* p, std::size_t i) {
  if constexpr (kDtype == KvDtype::kBF16) return bf16_value(load16(p + 2 * i));
  if constexpr (kDtype == KvDtype::kF16) return f16_value(load16(p + 2 * i));
  float value;
  __builtin_memcpy(&value, p + 4 * i, 4);
  return value;
}

template <KvDtype kDtype>
inline void widen(const std::uint8_t* from, std::size_t count, float* to) {
  for (std::size_t i = 0; i < count; ++i) to[i] = load_value<kDtype>(from, i);
}

inline void widen(KvDtype dtype, const std::uint8_t* from, std::size_t count, float* to) {
  switch (dtype) {
    case KvDtype::kBF16: return widen<KvDtype::kBF16>(from, count, to);
    case KvDtype::kF16: return widen<KvDtype::kF16>(from, count, to);
    case KvDtype::kF32: return widen<KvDtype::kF32>(from, count, to);
  }
}

// Scales and zeros are float16 for float16 models, else bfloat16.
inline KvDtype param_dtype(const KvRecord& r) { return r.dtype == KvDtype::kF16 ? KvDtype::kF16 : KvDtype::kBF16; }

}  // namespace
}  // namespace bitforbit
