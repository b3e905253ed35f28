// The functions of bf16x2.cuh on a CPU, as the PTX manual has them. Included by shim.hpp after async.hpp.
#pragma once

#include <cmath>

#include "fibres.hpp"

inline unsigned to_pair(float low, float high) { return to_bf16(low) | unsigned(to_bf16(high)) << 16; }
inline unsigned multiply_pairs(unsigned a, unsigned b) {
  return to_pair(__uint_as_float(a << 16) * __uint_as_float(b << 16),
                 __uint_as_float(a & 0xFFFF0000) * __uint_as_float(b & 0xFFFF0000));
}
inline unsigned lost_pairs(unsigned a, unsigned b, unsigned product) {
  // A product of two BF16 and its difference from its rounding have 16 bits at most: FP64 holds both, and FP32 the
  // difference, but for subnormals.
  auto lost = [](unsigned x, unsigned y, unsigned z) {
    return float(double(__uint_as_float(x)) * __uint_as_float(y) - __uint_as_float(z));
  };
  return to_pair(lost(a << 16, b << 16, product << 16), lost(a & 0xFFFF0000, b & 0xFFFF0000, product & 0xFFFF0000));
}
inline unsigned add_pairs(unsigned a, unsigned b) {
  // FP64 holds the sums of two BF16 of like size; to FP32 and BF16 is one rounding where FP32 holds them, too.
  return to_pair(float(double(__uint_as_float(a << 16)) + __uint_as_float(b << 16)),
                 float(double(__uint_as_float(a & 0xFFFF0000)) + __uint_as_float(b & 0xFFFF0000)));
}
inline unsigned mask_or(unsigned word, unsigned mask, unsigned bits) { return (word & mask) | bits; }
inline unsigned transpose(unsigned pair, SHIM_SITE) {
  const uint64_t word = pair;
  const shim::Collective& all = shim::meet({"transpose", file, line}, 0xFFFFFFFFu, &word, 1);
  if (all.arrived != 0xFFFFFFFFu) shim::fail("transpose: a lane has exited");
  const unsigned row = shim::g_context.lane / 4, column = shim::g_context.lane % 4 * 2;
  auto element = [&](unsigned r, unsigned c) {
    return unsigned(all.values[4 * r + c / 2][0] >> (16 * (c % 2))) & 0xFFFF;
  };
  return element(column, row) | element(column + 1, row) << 16;
}
inline float power_of_2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1 / x; }
inline void prefetch(const void*) {}
