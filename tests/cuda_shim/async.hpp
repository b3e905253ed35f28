// The functions of async.cuh, mma.cuh and ldmatrix.cuh on a CPU, as the PTX manual has them. Included by shim.hpp.
#pragma once

#include "fibres.hpp"

// --- async.cuh
// ---------------------------------------------------------------------------------------------------------

inline void copy_async(void* smem, const void* gmem) { shim::copy_async(smem, gmem, 16, 16); }
inline void copy_async_or_zeros(void* smem, const void* gmem, bool copy) {
  shim::copy_async(smem, gmem, 16, copy ? 16 : 0);
}
template <unsigned kBytes>
void copy_async_part(void* smem, const void* gmem, unsigned valid) {
  static_assert(kBytes == 4 || kBytes == 8);
  shim::copy_async(smem, gmem, kBytes, valid);
}
inline void commit_copies() { shim::copy_async_commit(); }
template <unsigned kGroups>
void await_copies() {
  shim::copy_async_wait(kGroups);
}
inline void mbarrier_init(unsigned long long* barrier, unsigned count) { shim::mbarrier_init(barrier, count); }
inline void mbarrier_fence() {}
inline void mbarrier_arrive(unsigned long long* barrier) { shim::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(unsigned long long* barrier, unsigned bytes) {
  shim::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(unsigned long long* barrier, unsigned parity, SHIM_SITE) {
  shim::mbarrier_wait({"mbarrier_wait", file, line}, barrier, parity);
}
inline void copy_bulk(void* smem, const void* gmem, unsigned bytes, unsigned long long* barrier) {
  shim::copy_bulk(smem, gmem, bytes, barrier);
}
inline void fence_async() { shim::fence_async(); }

// --- ldmatrix.cuh
// ------------------------------------------------------------------------------------------------------

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, with a generic address: ldmatrix.cuh has the meaning.
inline uint4 ldmatrix_x4(const void* row, SHIM_SITE) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("misaligned ldmatrix");
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  const shim::Collective& all = shim::meet({"ldmatrix", file, line}, 0xFFFFFFFFu, &address, 1);
  if (all.arrived != 0xFFFFFFFFu) shim::fail("ldmatrix: a lane has exited");
  const unsigned lane = shim::g_context.lane;
  unsigned words[4];
  for (unsigned k = 0; k < 4; ++k) {
    const char* source = reinterpret_cast<const char*>(all.values[8 * k + lane / 4][0]) + 4 * (lane % 4);
    shim::touched(source, 4, false);
    std::memcpy(&words[k], source, 4);
  }
  shim::meet({"ldmatrix", file, line}, 0xFFFFFFFFu, nullptr, 0);  // no lane goes on before all have read
  return {words[0], words[1], words[2], words[3]};
}

// --- mma.cuh
// -----------------------------------------------------------------------------------------------------------

inline float from_f16(unsigned short word) {
  _Float16 value;
  std::memcpy(&value, &word, 2);
  return float(value);
}

// 16 bits of a word, [15:0] first, as a number.
inline float element_of(uint64_t word, unsigned at, bool is_f16) {
  const auto bits = static_cast<unsigned short>(word >> (16 * at));
  return is_f16 ? from_f16(bits) : __uint_as_float(unsigned(bits) << 16);
}

inline void mma_any(const shim::Site& site, bool is_f16, float (&c)[4], uint4 a, unsigned b0, unsigned b1) {
  const uint64_t words[3] = {a.x | uint64_t(a.y) << 32, a.z | uint64_t(a.w) << 32, b0 | uint64_t(b1) << 32};
  const shim::Collective& all = shim::meet(site, 0xFFFFFFFFu, words, 3);
  if (all.arrived != 0xFFFFFFFFu) shim::fail(site, "a lane has exited");
  const unsigned q = shim::g_context.lane / 4, t = shim::g_context.lane % 4;
  auto element = [&](unsigned lane, unsigned word, unsigned at) {
    return element_of(all.values[lane][word], at, is_f16);
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = q + 8 * (e / 2), column = 2 * t + e % 2;
    float left[16], right[16];
    for (unsigned k = 0; k < 16; ++k) {
      left[k] = element(4 * (row % 8) + k % 8 / 2, k / 8, 2 * (row / 8) + k % 2);
      right[k] = element(4 * column + k % 8 / 2, 2, 2 * (k / 8) + k % 2);
    }
    c[e] = shim::dot16(left, right, c[e]);
  }
}

inline void mma_bf16(float (&c)[4], uint4 a, unsigned b0, unsigned b1, SHIM_SITE) {
  mma_any({"mma_bf16", file, line}, false, c, a, b0, b1);
}
inline void mma_f16(float (&c)[4], uint4 a, unsigned b0, unsigned b1, SHIM_SITE) {
  mma_any({"mma_f16", file, line}, true, c, a, b0, b1);
}

// Zeros in the other half of the columns change nothing in these sums, but for the sign of a zero: c is never -0 here.
inline void mma_bf16_half(float (&c)[4], unsigned a0, unsigned a1, unsigned b0, SHIM_SITE) {
  mma_bf16(c, make_uint4(a0, a1, 0, 0), b0, 0, file, line);
}
inline void mma_f16_half(float (&c)[4], unsigned a0, unsigned a1, unsigned b0, SHIM_SITE) {
  mma_f16(c, make_uint4(a0, a1, 0, 0), b0, 0, file, line);
}

// To the nearest, ties to even; NaNs become 0x7FFF.
inline unsigned short to_bf16(float value) {
  const unsigned bits = __float_as_uint(value);
  return value != value ? 0x7FFF : static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

inline unsigned short to_f16(float value) {
  const auto rounded = static_cast<_Float16>(value);
  unsigned short word;
  std::memcpy(&word, &rounded, 2);
  return value != value ? 0x7FFF : word;
}
