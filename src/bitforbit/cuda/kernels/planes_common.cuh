// The planes format (docs/format.md, section 3) as kernels see it: sizes, digits, exponents of digits.
#pragma once

#include "portable.cuh"

constexpr u32 kBlockRows = 16;
constexpr u32 kGroup = 64;         // positions
constexpr u32 kGroupLanes = 4;     // lanes that share a group: lane q has positions 16q to 16q + 15
constexpr u32 kDigitBytes = 16;    // of a group of 2-bit digits
constexpr u32 kTableBytes = 16;    // nine exponents by rank, seven zeros
constexpr u32 kCountBytes = 12;    // u32 n2, n3, n4 of a block
constexpr u32 kChunkGroups = 128;  // groups of one block that a thread block decodes at once; 8192 weights

// What decoding needs to know of a block: byte offsets of the three levels in the tails, and the number of its table.
constexpr u32 kStartWords = 4;  // u64 each

// Bit 2k of the result: whether 2-bit digit k of a word is 3.
__device__ __forceinline__ u32 threes(u32 digits) { return digits & (digits >> 1) & 0x55555555; }

__device__ __forceinline__ u32 count_threes(uint4 group) {
  return __popc(threes(group.x) | threes(group.y) << 1) + __popc(threes(group.z) | threes(group.w) << 1);
}

// Sum over the lanes up to and with this one.
template <class T>
__device__ __forceinline__ T warp_inclusive_sum(T value, u32 lane) {
#pragma unroll
  for (u32 delta = 1; delta < kWarp; delta *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, delta);
    if (lane >= delta) value += below;
  }
  return value;
}

// The same; shuffles tell lanes without a lower one apart, which saves the comparisons.
__device__ __forceinline__ u32 warp_inclusive_sum32(u32 value, u32 lane) {
#ifdef BITFORBIT_CUDA_SHIM
  return warp_inclusive_sum(value, lane);
#else
#pragma unroll
  for (u32 delta = 1; delta < kWarp; delta *= 2) {
    asm volatile(
        "{.reg .u32 below; .reg .pred has;\n"
        "shfl.sync.up.b32 below|has, %0, %1, 0, 0xffffffff;\n"
        "@has add.u32 %0, %0, below;}"
        : "+r"(value)
        : "r"(delta));
  }
  return value;
#endif
}

__device__ __forceinline__ u32 warp_sum(u32 value) { return __reduce_add_sync(kAllLanes, value); }
