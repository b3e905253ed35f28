// FP8 weights (E4M3: no infinities, NaN is S.1111.111) in tiles: 7 bits each. cuda/tiles/layout.py says where every bit
// lies. In registers and in shared memory a weight has 16 bits: sign [15], exponent [10:7], mantissa [6:4]. That is its
// value in BF16, subnormals included, times 2^-120. A NaN always is an escape, with the exponent 255, as in BF16.
#pragma once
#include "portable.cuh"

#if BITFORBIT_WEIGHTS == 2

using Element = u8;  // of a matrix

constexpr u32 kTileBytes = 896;
constexpr u32 kTileCodes = 512, kLaneCodeBytes = 4;  // byte at which the words of signs begin; from lane to lane
constexpr u32 kExponentShift = 7;
constexpr u32 kExponentBits = 0x7F80;          // of a weight: [14:7]
constexpr u32 kSignMantissaPair = 0x80708070;  // of a pair: [31], [22:20], [15], [6:4]
constexpr u32 kExponentPair = 0x00800080;      // a pair of ones at the exponents' lowest bits
constexpr u32 kStoredPair = 0x83F083F0;        // of a pair without the base: [31], [25:20], [15], [9:4]

// A lane's share of a tile. Pairs 2k and 2k + 1 are made of two words of four bytes each, one for each weight: low
// byte of a weight [7:4] (the code's bit 0, and the mantissa), high byte [7] sign, [1:0] bits 2 and 1 of the code.
struct Lane {
  u32 low[4];   // of k = 2i: the high nibbles; of k = 2i + 1: the low ones
  u32 high[3];  // of k = 0-2: [7], [1:0] of bytes; of k = 3-5: the same, rotated left by 3; of 6 and 7: what is left
};

// A load of 16 bytes, three of 4, coalesced. Pointers are this lane's: to its first words of either kind.
template <class Load>
__device__ __forceinline__ void read_lane(const u8* words, const u8* signs, Load load, Lane& lane) {
  const uint4 low = load(reinterpret_cast<const uint4*>(words));
  lane.low[0] = low.x, lane.low[1] = low.y, lane.low[2] = low.z, lane.low[3] = low.w;
#pragma unroll
  for (u32 w = 0; w < 3; ++w) lane.high[w] = load(reinterpret_cast<const u32*>(signs) + kWarp * w);
}

__device__ __forceinline__ void write_lane(u8* words, u8* signs, const Lane& lane) {
  *reinterpret_cast<uint4*>(words) = make_uint4(lane.low[0], lane.low[1], lane.low[2], lane.low[3]);
#pragma unroll
  for (u32 w = 0; w < 3; ++w) reinterpret_cast<u32*>(signs)[kWarp * w] = lane.high[w];
}

// The base as decode_lane takes it.
__device__ __forceinline__ u32 base_word(u32 base) { return base * kExponentPair; }

// High bytes of the four weights of pairs 2k and 2k + 1, without the base; other bits are garbage.
__device__ __forceinline__ u32 high_bytes(const u32 (&high)[3], u32 k) {
  if (k < 3) return high[k];
  if (k < 6) return high[k - 3] >> 3 | high[k - 3] << 29;
  // Bits of the code: [6:5] of bytes of word 0 or 1. Signs: [6] or [5] of bytes of word 2.
  return (high[2] << (k - 5) & 0x80808080) | (high[k - 6] >> 5 & ~0x80808080);
}

// A lane's 32 weights: pair[4i + r] is register r of step i. Escapes have the base as their exponent.
__device__ __forceinline__ void decode_lane(const Lane& lane, u32 base_pair, u32 (&pair)[kPairs]) {
#pragma unroll
  for (u32 k = 0; k < kPairs / 2; ++k) {
    const u32 low = k % 2 == 0 ? lane.low[k / 2] : lane.low[k / 2] << 4, high = high_bytes(lane.high, k);
    pair[2 * k] = (__byte_perm(low, high, 0x5140) & kStoredPair) + base_pair;
    pair[2 * k + 1] = (__byte_perm(low, high, 0x7362) & kStoredPair) + base_pair;
  }
}

// Puts pair p into a lane's share that began as zeros. `rest`: the pair without its exponents; `codes`: [2:0] that of
// the low half, [18:16] that of the high half.
__device__ __forceinline__ void encode_pair(Lane& lane, u32 p, u32 rest, u32 codes) {
  const u32 k = p / 2, stored = rest | codes << kExponentShift;
  u32 low = 0, high = 0;  // of this pair, as in the two words
#pragma unroll
  for (u32 h = 0; h < 2; ++h) {
    const u32 at = 8 * (2 * (p % 2) + h), weight = stored >> 16 * h;
    low |= (weight & 0xF0) << at;
    high |= (weight >> 8 & 0x83) << at;
  }
  lane.low[k / 2] |= k % 2 == 0 ? low : low >> 4;
  if (k < 3) {
    lane.high[k] |= high;
  } else if (k < 6) {
    lane.high[k - 3] |= high << 3 | high >> 29;
  } else {
    lane.high[k - 6] |= (high & 0x03030303) << 5;
    lane.high[2] |= (high & 0x80808080) >> (k - 5);
  }
}

__device__ __forceinline__ u32 from_element(Element element) {
  const u32 weight = (element & 0x80u) << 8 | (element & 0x7Fu) << 4;
  return (element & 0x7F) == 0x7F ? weight | kExponentBits : weight;
}

__device__ __forceinline__ Element to_element(u32 weight) {
  return static_cast<Element>((weight >> 8 & 0x80) | (weight >> 4 & 0x7F));  // [15] and [10:4]
}

using Eight = uint2;  // eight elements

__device__ __forceinline__ Eight to_elements(uint4 eight) {
  const auto four = [](u32 a, u32 b) {  // high bytes: [15] is the sign; four bits further left, [14:8] is the rest
    return (__byte_perm(a, b, 0x7531) & 0x80808080) | (__byte_perm(a << 4, b << 4, 0x7531) & 0x7F7F7F7F);
  };
  return make_uint2(four(eight.x, eight.y), four(eight.z, eight.w));
}

#ifdef BITFORBIT_CUDA_SHIM

inline u32 scaled(u32 pair) {
  const auto one = [](u32 word) {
    const float value = __uint_as_float(word << 16) * 0x1p120f;
    return value != value ? 0x7FFFu : __float_as_uint(value) >> 16;  // exact, or too large
  };
  return one(pair & 0xFFFF) | one(pair >> 16) << 16;
}

#else

// A pair times 2^120, exact for all weights; the -0 that is added keeps the signs of zeros.
__device__ __forceinline__ u32 scaled(u32 pair) {
  u32 product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(pair), "r"(0x7B807B80), "r"(0x80008000));
  return product;
}

#endif

// Products take them as BF16.
__device__ __forceinline__ uint4 operand(uint4 a) {
  return make_uint4(scaled(a.x), scaled(a.y), scaled(a.z), scaled(a.w));
}

#endif
