// FP16 weights in tiles: 14 bits each. cuda/tiles/layout.py says where every bit lies.
#pragma once
#include "portable.cuh"

#if BITFORBIT_WEIGHTS == 1

using Element = u16;  // of a matrix

constexpr u32 kTileBytes = 1792;
constexpr u32 kTileCodes = 1536,
              kLaneCodeBytes = 8;  // byte at which words 12 and 13 begin; from one lane's to the next's
constexpr u32 kExponentShift = 10;
constexpr u32 kExponentBits = 0x7C00;          // of a weight: [14:10]
constexpr u32 kSignMantissaPair = 0x83FF83FF;  // of a pair: [31], [25:16], [15], [9:0]
constexpr u32 kExponentPair = 0x04000400;      // a pair of ones at the exponents' lowest bits
constexpr u32 kStoredPair = 0x9FFF9FFF;        // of a pair without the base: all but [14:13] and [30:29]

// A lane's share of a tile: word p is pair p without the base, and two bits of pair 14 (words 0-6) or 15 (7-13).
struct Lane {
  u32 word[14];
};

// Three loads of 16 bytes, one of 8, coalesced. Pointers are this lane's: to its first words, to its last two.
template <class Load>
__device__ __forceinline__ void read_lane(const u8* words, const u8* last, Load load, Lane& lane) {
#pragma unroll
  for (u32 i = 0; i < 3; ++i) {
    const uint4 four = load(reinterpret_cast<const uint4*>(words) + kWarp * i);
    lane.word[4 * i] = four.x, lane.word[4 * i + 1] = four.y;
    lane.word[4 * i + 2] = four.z, lane.word[4 * i + 3] = four.w;
  }
  const uint2 two = load(reinterpret_cast<const uint2*>(last));
  lane.word[12] = two.x, lane.word[13] = two.y;
}

__device__ __forceinline__ void write_lane(u8* words, u8* last, const Lane& lane) {
  const u32(&w)[14] = lane.word;
#pragma unroll
  for (u32 i = 0; i < 3; ++i) {
    reinterpret_cast<uint4*>(words)[kWarp * i] = make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
  }
  *reinterpret_cast<uint2*>(last) = make_uint2(w[12], w[13]);
}

// The base as decode_lane takes it.
__device__ __forceinline__ u32 base_word(u32 base) { return base * kExponentPair; }

// Bits of `a` where the mask has ones, of `b` elsewhere: one instruction.
__device__ __forceinline__ u32 choose(u32 mask, u32 a, u32 b) { return (a & mask) | (b & ~mask); }

// A lane's 32 weights: pair[4i + r] is register r of step i. Escapes have the base as their exponent.
__device__ __forceinline__ void decode_lane(const Lane& lane, u32 base_pair, u32 (&pair)[kPairs]) {
#pragma unroll
  for (u32 p = 0; p < 14; ++p) pair[p] = (lane.word[p] & kStoredPair) + base_pair;
#pragma unroll
  for (u32 q = 0; q < 2; ++q) {  // two bits of a word, [14:13], at a time, lowest first: they move down by two each
    const u32* word = lane.word + 7 * q;
    u32 bits = word[0];
#pragma unroll
    for (u32 j = 1; j < 6; ++j) bits = choose(0x60006000, word[j], bits >> 2);
    bits = choose(0x0FFF0FFF, bits >> 3, word[6] >> 1);  // [14:3] to [11:0]; [13] to [12]
    bits = choose(0x80008000, word[6] << 1, bits);       // [14] to [15]: the sign
    pair[14 + q] = (bits & kStoredPair) + base_pair;
  }
}

// Puts pair p into a lane's share that began as zeros. `rest`: the pair without its exponents; `codes`: [2:0] that of
// the low half, [18:16] that of the high half.
__device__ __forceinline__ void encode_pair(Lane& lane, u32 p, u32 rest, u32 codes) {
  const u32 stored = rest | codes << kExponentShift;
  if (p < 14) {
    lane.word[p] |= stored;
    return;
  }
  u32* word = lane.word + 7 * (p - 14);
#pragma unroll
  for (u32 j = 0; j < 6; ++j) word[j] |= (stored >> 2 * j & 0x00030003) << 13;
  word[6] |= (stored & 0x10001000) << 1 | (stored & 0x80008000) >> 1;
}

// A matrix's elements are the weights in registers.
__device__ __forceinline__ u32 from_element(Element element) { return element; }
__device__ __forceinline__ Element to_element(u32 weight) { return static_cast<Element>(weight); }
__device__ __forceinline__ uint4 to_elements(uint4 eight) { return eight; }
using Eight = uint4;  // eight elements

// Products take them as they are.
__device__ __forceinline__ uint4 operand(uint4 a) { return a; }

#endif
