// Activations of family `lanes` as the FMA kernels read them: FP32, per chunk of 32 columns the 16 odd ones first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "generic/lanes_panel.hpp"

namespace bitforbit {
namespace {

template <class L>
inline void pack_odd_even(const LinearInput& in, std::uint8_t* packed) {
  pack_panels<L>(in, packed, [&](std::size_t token, std::size_t column, std::size_t n, std::uint8_t* out) {
    const std::size_t first = token * in.cols + column;
    __builtin_memset(out, 0, (n + kChunk - 1) / kChunk * L::kInputBytes);
    for (std::size_t k = 0; k < n; ++k) {
      std::uint32_t word = 0;
      if (in.f32) {
        __builtin_memcpy(&word, in.x + 4 * (first + k), 4);
      } else {
        const std::uint8_t* p = in.x + 2 * (first + k);
        word = static_cast<std::uint32_t>(p[0] | p[1] << 8) << 16;
      }
      const std::size_t at = k / kChunk * kChunk + (k % 2 ? 0 : kLanes) + k % kChunk / 2;
      __builtin_memcpy(out + 4 * at, &word, 4);
    }
  });
}

}  // namespace
}  // namespace bitforbit
