// BF16 weights in tiles: 11 bits each. cuda/tiles/layout.py says where every bit lies.
#pragma once
#include "portable.cuh"

#if BITFORBIT_WEIGHTS == 0

using Element = u16;  // of a matrix

constexpr u32 kTileBytes = 1408;
constexpr u32 kTileCodes = 1024, kLaneCodeBytes = 4;  // byte at which the codes begin; from one lane's to the next's
constexpr u32 kExponentShift = 7;
constexpr u32 kExponentBits = 0x7F80;          // of a weight: [14:7]
constexpr u32 kSignMantissaPair = 0x807F807F;  // of a pair: [31], [22:16], [15], [6:0]
constexpr u32 kExponentPair = 0x00800080;      // a pair of ones at the exponents' lowest bits

// A lane's share of a tile.
struct Lane {
  u32 word[8];  // of signs and mantissas
  u32 code[3];
};

// Two loads of 16 bytes, three of 4, coalesced. Pointers are this lane's: to its first words, to its first codes.
template <class Load>
__device__ __forceinline__ void read_lane(const u8* words, const u8* codes, Load load, Lane& lane) {
  const uint4 low = load(reinterpret_cast<const uint4*>(words));
  const uint4 high = load(reinterpret_cast<const uint4*>(words) + kWarp);
  lane.word[0] = low.x, lane.word[1] = low.y, lane.word[2] = low.z, lane.word[3] = low.w;
  lane.word[4] = high.x, lane.word[5] = high.y, lane.word[6] = high.z, lane.word[7] = high.w;
#pragma unroll
  for (u32 w = 0; w < 3; ++w) lane.code[w] = load(reinterpret_cast<const u32*>(codes) + kWarp * w);
}

__device__ __forceinline__ void write_lane(u8* words, u8* codes, const Lane& lane) {
  const u32(&w)[8] = lane.word;
  reinterpret_cast<uint4*>(words)[0] = make_uint4(w[0], w[1], w[2], w[3]);
  reinterpret_cast<uint4*>(words)[kWarp] = make_uint4(w[4], w[5], w[6], w[7]);
#pragma unroll
  for (u32 i = 0; i < 3; ++i) reinterpret_cast<u32*>(codes)[kWarp * i] = lane.code[i];
}

// The base as decode_lane takes it.
__device__ __forceinline__ u32 base_word(u32 base) { return base * kExponentPair; }

// Sign and mantissa of pair p, at their places; the exponents' bits are garbage.
__device__ __forceinline__ u32 sign_mantissa_pairs(const u32 (&word)[8], u32 p) {
  return p % 2 == 0 ? word[p / 2] : __byte_perm(word[p / 2], 0, 0x0321);  // rotated right by 8
}

// Exponents of pair p, at [14:7] and [30:23]: base_pair (base * kExponentPair) plus the codes. A mask, then a
// multiplication by a power of two, which moves the codes to [9:7] and [25:23] and adds the base in the same
// instruction, on the pipe that the other instructions leave free.
__device__ __forceinline__ u32 exponents(const u32 (&code)[3], u32 p, u32 base_pair) {
  if (p == 15) {  // one bit of each word: [16] and [0]
    const u32 bits = multiply_add<4>(code[2] & 0x00010001, multiply_add<2>(code[1] & 0x00010001, code[0] & 0x00010001));
    return multiply_add<128>(bits, base_pair);
  }
  const u32 word = code[p / 5];
  switch (p % 5) {
    case 0: return multiply_add<64>(word & 0x000E000E, base_pair);       // [3:1] and [19:17]
    case 1: return multiply_add<8>(word & 0x00700070, base_pair);        // [6:4] and [22:20]
    case 2: return (word & 0x03800380) + base_pair;                      // [9:7] and [25:23]
    case 3: return multiply_add<64>(word >> 9 & 0x000E000E, base_pair);  // [12:10] and [28:26]
    default: return multiply_add<8>(word >> 9 & 0x00700070, base_pair);  // [15:13] and [31:29]
  }
}

// A lane's 32 weights: pair[4i + r] is register r of step i. Escapes have the base as their exponent.
__device__ __forceinline__ void decode_lane(const Lane& lane, u32 base_pair, u32 (&pair)[kPairs]) {
#pragma unroll
  for (u32 p = 0; p < kPairs; ++p) {
    pair[p] = (sign_mantissa_pairs(lane.word, p) & kSignMantissaPair) | exponents(lane.code, p, base_pair);
  }
}

// Puts pair p into a lane's share that began as zeros. `rest`: the pair without its exponents; `codes`: [2:0] that of
// the low half, [18:16] that of the high half.
__device__ __forceinline__ void encode_pair(Lane& lane, u32 p, u32 rest, u32 codes) {
  if (p % 2 == 0) {
    lane.word[p / 2] = rest;
  } else {
    lane.word[p / 2] |= __byte_perm(rest, 0, 0x2103);  // rotated left by 8
  }
  if (p < 15) {
    lane.code[p / 5] |= codes << (3 * (p % 5) + 1);
  } else {
#pragma unroll
    for (u32 w = 0; w < 3; ++w) lane.code[w] |= codes >> w & 0x00010001;
  }
}

// A matrix's elements are the weights in registers.
__device__ __forceinline__ u32 from_element(Element element) { return element; }
__device__ __forceinline__ Element to_element(u32 weight) { return static_cast<Element>(weight); }
__device__ __forceinline__ uint4 to_elements(uint4 eight) { return eight; }
using Eight = uint4;  // eight elements

// Products take them as they are.
__device__ __forceinline__ uint4 operand(uint4 a) { return a; }

#endif
