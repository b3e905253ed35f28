// Digits of the planes format to exponents, eight at a time in the nibbles of a word.
#pragma once

#include "planes_common.cuh"

// Sixteen digits: position 16q + i of a group at bits [1:0] of nibble i % 8 of `low` (i < 8) or `high`; bits [3:2] are
// anything.
struct Digits {
  u32 low, high;
};

__device__ __forceinline__ u32 rotate_right(u32 word, u32 bits) { return __funnelshift_r(word, word, bits); }

// Bytes of {b, a} by the nibbles 0-7 at selector[15:0]. __byte_perm masks each selector first; these need no mask.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
#ifdef BITFORBIT_CUDA_SHIM
  return __byte_perm(a, b, selector);
#else
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
#endif
}

// The low word of {high, low} >> bits, bits at most 32.
__device__ __forceinline__ u32 shift_pair(u32 low, u32 high, u32 bits) { return __funnelshift_rc(low, high, bits); }

// Digits 16q to 16q + 7 of a group, in eight bytes, each with digit i at bits [2q + 1 : 2q].
__device__ __forceinline__ u32 unpack_half(u32 first, u32 second, u32 q) {
  const u32 even = permute(first, second, 0x6420), odd = permute(first, second, 0x7531);
  const u32 mask = 0x03030303u << (2 * q);
  return rotate_right((even & mask) | (rotate_right(odd, 28) & ~mask), 2 * q);
}

__device__ __forceinline__ Digits unpack_digits(uint4 group, u32 q) {
  return {unpack_half(group.x, group.y, q), unpack_half(group.z, group.w, q)};
}

// Bit 4k: whether digit k is 3.
__device__ __forceinline__ u32 nibble_threes(u32 digits) { return digits & (digits >> 1) & 0x11111111; }

__device__ __forceinline__ u32 count_threes(Digits digits) {
  return __popc(nibble_threes(digits.low) | nibble_threes(digits.high) << 1);
}

// Exponents of eight digits, as bytes: digits 0-2 by `table`, each 3 by the next byte of `smem_next` from `at` on.
// Reads 12 bytes from at - at % 4 on.
__device__ __forceinline__ uint2 exponents8(u32 digits, u32 marks, const u8* smem_next, u32 at, u32 table) {
  const u32 sevens = 7 * marks, low = marks & 0x0000FFFF, high = marks & 0xFFFF0000;
  // Selectors for a byte permute of table and window, by nibble: the digit, or 4 + how many 3s of its four are before
  // it.
  const u32 by_digit = digits & 0x33333333 & ~sevens;
  const u32 select_low = by_digit | ((low * 0x1110 + 0x4444) & sevens);
  const u32 select_high = by_digit | ((high * 0x1110 + 0x44440000) & sevens);
  const u32* next = reinterpret_cast<const u32*>(smem_next + (at & ~3u));
  const u32 first = __funnelshift_r(next[0], next[1], 8 * at);
  const u32 behind = __funnelshift_r(next[1], next[2], 8 * at);
  const u32 second = shift_pair(first, behind, 8 * __popc(low));
  return make_uint2(permute(table, first, select_low), permute(table, second, select_high >> 16));
}

__device__ __forceinline__ uint4 exponents16(Digits digits, const u8* smem_next, u32 at, u32 table) {
  const u32 marks = nibble_threes(digits.low);
  const uint2 a = exponents8(digits.low, marks, smem_next, at, table);
  const uint2 b = exponents8(digits.high, nibble_threes(digits.high), smem_next, at + __popc(marks), table);
  return make_uint4(a.x, a.y, b.x, b.y);
}
