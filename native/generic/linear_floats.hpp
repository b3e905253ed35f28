// FP32 arithmetic as the families of products define it, in portable C++: the meaning of the vector kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace bitforbit {
namespace {

inline float bf16_to_float(const std::uint8_t* p) {
  const std::uint32_t word = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline float flush_denormal(float value) {
  return __builtin_fabsf(value) < 0x1p-126f ? __builtin_copysignf(0.0f, value) : value;
}

// a * b + c rounded once, to nearest even; denormal inputs are zeros, denormal results become zeros (of their sign).
// x86's FMA with MXCSR FTZ and DAZ, and one half of VDPBF16PS. a * b must be exact in double: it is for any floats.
inline float fma_flushed(float a, float b, float c) {
  const double product = static_cast<double>(flush_denormal(a)) * flush_denormal(b);
  const double addend = flush_denormal(c);
  double sum = product + addend;
  if (sum != sum || __builtin_isinf(sum)) return static_cast<float>(sum);
  // What the addition lost (Knuth's TwoSum). Rounding the sum to odd first makes the second rounding, to float, right.
  const double other = sum - product;
  const double lost = (product - (sum - other)) + (addend - other);
  if (lost != 0) {
    std::uint64_t word;
    std::memcpy(&word, &sum, 8);
    if (!(word & 1)) word += (lost > 0) == (sum > 0) ? 1 : ~std::uint64_t{0};
    std::memcpy(&sum, &word, 8);
  }
  if (__builtin_fabs(sum) >= 0x1p-125) return static_cast<float>(sum);
  // Tiny is what is below the smallest normal number after rounding to 24 bits: round where 24 bits are to be had.
  const float scaled = static_cast<float>(sum * 0x1p100);
  return __builtin_fabsf(scaled) < 0x1p-26f ? static_cast<float>(__builtin_copysign(0.0, sum)) : scaled * 0x1p-100f;
}

inline float add_flushed(float a, float b) { return fma_flushed(1.0f, a, b); }

// Activations as FP32, every row filled up with zeros to `stride` columns.
inline void pack_floats(const std::uint8_t* x, bool f32, std::size_t tokens, std::size_t cols, std::size_t stride,
                        float* packed) {
  for (std::size_t t = 0; t < tokens; ++t, packed += stride) {
    for (std::size_t k = 0; k < stride; ++k) packed[k] = 0.0f;
    if (f32) {
      std::memcpy(packed, x + 4 * t * cols, 4 * cols);
    } else {
      for (std::size_t k = 0; k < cols; ++k) packed[k] = bf16_to_float(x + 2 * (t * cols + k));
    }
  }
}

}  // namespace
}  // namespace bitforbit
