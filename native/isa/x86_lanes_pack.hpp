// Activations of family `lanes` as the FMA kernels read them: FP32, per chunk of 32 columns the 16 odd ones first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline void pack_odd_even(const LinearInput& in, std::uint8_t* packed) {
  const std::size_t padded = (in.cols + 31) / 32 * 32;
  for (std::size_t t = 0; t < in.tokens; ++t) {
    for (std::size_t k = 0; k < padded; ++k) {
      std::uint32_t word = 0;
      if (k < in.cols && in.f32) {
        __builtin_memcpy(&word, in.x + 4 * (t * in.cols + k), 4);
      } else if (k < in.cols) {
        const std::uint8_t* p = in.x + 2 * (t * in.cols + k);
        word = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
      }
      const std::size_t at = k / 32 * 32 + (k % 2 ? 0 : 16) + k % 32 / 2;
      __builtin_memcpy(packed + 4 * (t * padded + at), &word, 4);
    }
  }
}

}  // namespace
}  // namespace bitforbit
