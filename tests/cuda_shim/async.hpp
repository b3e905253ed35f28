// The functions of async.cuh, mma.cuh and ldmatrix.cuh on a CPU, as the PTX manual has them. Included by shim.hpp.
#pragma once

#include "fibres.hpp"

// --- async.cuh
// ---------------------------------------------------------------------------------------------------------

template <unsigned kBytes>
void copy_async(void* smem, const void* gmem, unsigned valid = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  shim::copy_async(smem, gmem, kBytes, valid);
}
inline void copy_async_commit() { shim::copy_async_commit(); }
template <unsigned kPending>
void copy_async_wait() {
  shim::copy_async_wait(kPending);
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
inline void fence_async() {}

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

namespace shim {
inline float bf16(unsigned bits) { return __uint_as_float(bits << 16); }

// A row of A times a column of B, and c. Products of BF16 are exact in FP32; how they are added is chosen by the
// launch: in FP64 by ascending k, then c, rounded once; or c and one product after the other in FP32, rounded each
// time.
inline float dot16(const float (&row)[16], const float (&column)[16], float c) {
  if (g_mma_rounds_each) {
    for (unsigned k = 0; k < 16; ++k) c += row[k] * column[k];
    return c;
  }
  double sum = 0;
  for (unsigned k = 0; k < 16; ++k) sum += double(row[k]) * column[k];
  return float(sum + c);
}
}  // namespace shim

inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SHIM_SITE) {
  const uint64_t words[3] = {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b[0] | uint64_t(b[1]) << 32};
  const shim::Collective& all = shim::meet({"mma_bf16", file, line}, 0xFFFFFFFFu, words, 3);
  if (all.arrived != 0xFFFFFFFFu) shim::fail("mma_bf16: a lane has exited");
  const unsigned g = shim::g_context.lane / 4, t = shim::g_context.lane % 4;
  // Half `half` of register `r` of a lane's A (at words 0 and 1) or B (at word 2).
  auto element = [&](unsigned lane, unsigned word, unsigned r, unsigned half) {
    return shim::bf16(unsigned(all.values[lane][word + r / 2] >> (32 * (r % 2) + 16 * half)) & 0xFFFF);
  };
  for (unsigned r = 0; r < 4; ++r) {
    const unsigned row = g + 8 * (r / 2), col = 2 * t + r % 2;
    float left[16], right[16];
    for (unsigned k = 0; k < 16; ++k) {
      left[k] = element(4 * (row % 8) + k % 8 / 2, 0, row / 8 + 2 * (k / 8), k % 2);
      right[k] = element(4 * col + k % 8 / 2, 2, k / 8, k % 2);
    }
    d[r] = shim::dot16(left, right, d[r]);
  }
}
