// How each float kind is put together from exponents and the planes of sign and mantissa: 16 weights of a thread.
//
// BITFORBIT_KIND: 0 BF16, 1 F16, 2 F32, 3 F8_E4M3, 4 F8_E5M2, 5 BF16 widened to F32.
#pragma once

#include "planes_common.cuh"

constexpr u32 kBF16 = 0, kF16 = 1, kF32 = 2, kF8E4M3 = 3, kF8E5M2 = 4, kWideBF16 = 5;
constexpr u32 kKind = BITFORBIT_KIND;
constexpr u32 kItem = kKind == kF32 || kKind == kWideBF16 ? 4 : kKind == kBF16 || kKind == kF16 ? 2 : 1;  // bytes

constexpr u32 kLaneWeights = 16;
constexpr u32 kLaneWords = kLaneWeights * kItem / 4;
constexpr u32 kRuns = kItem == 1 ? 1 : 2;  // of consecutive columns
constexpr u32 kRunWords = kLaneWords / kRuns;

// Sign and mantissa of 16 weights, one byte each per plane: byte i is position 16q + i.
struct Fields {
  uint4 plane[3];
};

struct Weights {
  u32 word[kLaneWords];
};

// Column within the group of weight i of thread q.
__device__ __forceinline__ u32 natural_index(u32 q, u32 i) {
  if (kItem == 1) return 16 * q + i;
  return i < 8 ? 8 * q + i : 32 + 8 * q + (i - 8);
}

// Fields of `width` bits at bit `shift` of each byte.
__device__ __forceinline__ uint4 pick(uint4 packed, u32 shift, u32 width) {
  const u32 mask = ((1u << width) - 1) * 0x01010101;
  return make_uint4(packed.x >> shift & mask, packed.y >> shift & mask, packed.z >> shift & mask,
                    packed.w >> shift & mask);
}

// Where the planes of a block begin; groups are counted from there.
struct Planes {
  const u8* gmem[3];

  __device__ __forceinline__ Planes(const u8* gmem_planes, u64 plane1, u64 plane2, u64 first_group) {
    constexpr u32 kBits[3] = {kKind == kF8E4M3   ? 4
                              : kKind == kF8E5M2 ? 2
                                                 : 8,
                              kKind == kF16      ? 2
                              : kKind == kF8E5M2 ? 1
                                                 : 8,
                              kKind == kF16 ? 1 : 8};
    gmem[0] = gmem_planes + first_group * (kGroup / 8 * kBits[0]);
    gmem[1] = gmem_planes + plane1 + first_group * (kGroup / 8 * kBits[1]);
    gmem[2] = gmem_planes + plane2 + first_group * (kGroup / 8 * kBits[2]);
  }

  // Bytes: bytes 16q to 16q + 15 of 64 per group.
  __device__ __forceinline__ uint4 bytes(u32 plane, u32 group, u32 q) const {
    return load_once(reinterpret_cast<const uint4*>(gmem[plane]) + q + 4 * static_cast<u64>(group));
  }
  // 4 bits, 32 bytes per group: byte i has positions i and 32 + i.
  __device__ __forceinline__ uint4 nibbles(u32 plane, u32 group, u32 q) const {
    return pick(load_once(reinterpret_cast<const uint4*>(gmem[plane]) + q % 2 + 2 * static_cast<u64>(group)),
                4 * (q / 2), 4);
  }
  // 2 bits, 16 bytes per group: byte i has positions i, 16 + i, ...
  __device__ __forceinline__ uint4 twos(u32 plane, u32 group, u32 q) const {
    return pick(load_once(reinterpret_cast<const uint4*>(gmem[plane]) + group), 2 * q, 2);
  }
  // Single bits, 8 bytes per group: byte i has positions i, 8 + i, ...
  __device__ __forceinline__ uint4 ones(u32 plane, u32 group, u32 q) const {
    const uint2 packed = load_once(reinterpret_cast<const uint2*>(gmem[plane]) + group);
    const uint4 low = pick(make_uint4(packed.x, packed.y, 0, 0), 2 * q, 1);
    const uint4 high = pick(make_uint4(packed.x, packed.y, 0, 0), 2 * q + 1, 1);
    return make_uint4(low.x, low.y, high.x, high.y);
  }

  __device__ __forceinline__ Fields load(u32 group, u32 q) const {
    Fields fields{};
    if constexpr (kKind == kF8E4M3) {
      fields.plane[0] = nibbles(0, group, q);
    } else if constexpr (kKind == kF8E5M2) {
      fields.plane[0] = twos(0, group, q);
      fields.plane[1] = ones(1, group, q);
    } else {
      fields.plane[0] = bytes(0, group, q);
    }
    if constexpr (kKind == kF16) {
      fields.plane[1] = twos(1, group, q);
      fields.plane[2] = ones(2, group, q);
    } else if constexpr (kKind == kF32) {
      fields.plane[1] = bytes(1, group, q);
      fields.plane[2] = bytes(2, group, q);
    }
    return fields;
  }
};

// Four 16-bit words of their low and high bytes.
__device__ __forceinline__ void interleave(u32 low, u32 high, u32* word) {
  word[0] = __byte_perm(low, high, 0x5140);
  word[1] = __byte_perm(low, high, 0x7362);
}

// Four exponents to bytes as join4 wants them: where the float has them, but for two bytes a float, rotated right by 1.
__device__ __forceinline__ u32 place_exponents(u32 e) {
  if constexpr (kKind == kF16 || kKind == kF8E5M2) return e << 2 & 0x7C7C7C7C;
  if constexpr (kKind == kF8E4M3) return e << 3 & 0x78787878;
  return (e >> 1 & 0x7F7F7F7F) | (e << 7 & 0x80808080);
}

// Bits of `a` where the mask has 1, of `b` elsewhere; in this form one instruction.
__device__ __forceinline__ u32 select(u32 mask, u32 a, u32 b) { return ((a ^ b) & mask) ^ b; }

// Four weights of four placed exponents and fields, all bytes, to kItem words.
__device__ __forceinline__ void join4(u32 e, u32 f0, u32 f1, u32 f2, u32* word) {
  if constexpr (kKind == kBF16 || kKind == kWideBF16 || kKind == kF32) {
    // Top field: [7] sign, [6:0] upper mantissa. Placed exponent: [7] exponent[0], [6:0] exponent[7:1].
    // Upper two bytes of the float: [15] sign, [14:7] exponent, [6:0] upper mantissa.
    const u32 top = kKind == kF32 ? f2 : f0;
    const u32 low = select(0x7F7F7F7F, top, e);
    const u32 high = select(0x7F7F7F7F, e, top);
    if constexpr (kKind == kBF16) {
      interleave(low, high, word);
    } else {
      u32 upper[2], lower[2] = {0, 0};
      interleave(low, high, upper);
      if constexpr (kKind == kF32) interleave(f0, f1, lower);
#pragma unroll
      for (u32 i = 0; i < 2; ++i) {
        word[2 * i] = __byte_perm(lower[i], upper[i], 0x5410);
        word[2 * i + 1] = __byte_perm(lower[i], upper[i], 0x7632);
      }
    }
  } else if constexpr (kKind == kF16) {
    // high byte: [7] sign, [6:2] exponent, [1:0] mantissa[9:8].
    interleave(f0, e | f1 | f2 << 7, word);
  } else if constexpr (kKind == kF8E4M3) {
    // field: [3] sign, [2:0] mantissa; byte: [7] sign, [6:3] exponent, [2:0] mantissa.
    word[0] = (f0 << 4 & 0x80808080) | e | (f0 & 0x07070707);
  } else {
    // byte: [7] sign, [6:2] exponent, [1:0] mantissa.
    word[0] = f1 << 7 | e | f0;
  }
}

__device__ __forceinline__ Weights join(uint4 e, const Fields& fields) {
  const uint4 *f0 = &fields.plane[0], *f1 = &fields.plane[1], *f2 = &fields.plane[2];
  Weights weights;
  join4(e.x, f0->x, f1->x, f2->x, weights.word);
  join4(e.y, f0->y, f1->y, f2->y, weights.word + kItem);
  join4(e.z, f0->z, f1->z, f2->z, weights.word + 2 * kItem);
  join4(e.w, f0->w, f1->w, f2->w, weights.word + 3 * kItem);
  return weights;
}

// One weight, whatever its alignment.
__device__ __forceinline__ void store_weight(u8* gmem_out, const Weights& weights, u32 i) {
  const u32 word = weights.word[i * kItem / 4] >> (8 * (i * kItem % 4));
  if constexpr (kItem == 4) *reinterpret_cast<u32*>(gmem_out) = word;
  if constexpr (kItem == 2) *reinterpret_cast<u16*>(gmem_out) = static_cast<u16>(word);
  if constexpr (kItem == 1) *gmem_out = static_cast<u8>(word);
}

// The 16 weights of thread q to their columns of the group at gmem_out. `unit`: bytes, divides that address.
__device__ __forceinline__ void store_weights(u8* gmem_out, const Weights& weights, u32 q, u32 unit) {
  u8* gmem_lane = gmem_out + natural_index(q, 0) * kItem;
#pragma unroll
  for (u32 run = 0; run < kRuns; ++run) {
    u8* gmem_run = gmem_lane + run * kGroup / 2 * kItem;
    const u32* word = weights.word + run * kRunWords;
    if (unit == 16) {
#pragma unroll
      for (u32 i = 0; i < kRunWords / 4; ++i) {
        store_once(reinterpret_cast<uint4*>(gmem_run) + i,
                   make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]));
      }
    } else if (unit >= 4) {
#pragma unroll
      for (u32 i = 0; i < kRunWords; ++i) reinterpret_cast<u32*>(gmem_run)[i] = word[i];
    } else {
#pragma unroll
      for (u32 i = 0; i < kLaneWeights / kRuns; ++i) {
        store_weight(gmem_run + i * kItem, weights, run * (kLaneWeights / kRuns) + i);
      }
    }
  }
}
