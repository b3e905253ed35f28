// The functions of wgmma.cuh on a CPU: wgmma.cpp is the engine. Included by shim.hpp.
#pragma once

#include "fibres.hpp"

// Addresses of shared memory as instructions have them: the block's dynamic shared memory begins on 128 bytes.
inline unsigned shared_address(const void* smem) { return shim::shared_address(smem); }

template <class T>
T kept(T value) {
  return value;
}

template <unsigned kTiles>
void wgmma_bf16(float (&sum)[kTiles][4], const uint4& a, unsigned long long b, SHIM_SITE) {
  shim::wgmma({"wgmma_bf16", file, line}, &sum[0][0], kTiles, &a.x, b, false);
}
template <unsigned kTiles>
void wgmma_f16(float (&sum)[kTiles][4], const uint4& a, unsigned long long b, SHIM_SITE) {
  shim::wgmma({"wgmma_f16", file, line}, &sum[0][0], kTiles, &a.x, b, true);
}
inline void wgmma_fence(SHIM_SITE) { shim::wgmma_fence({"wgmma_fence", file, line}); }
inline void wgmma_commit(SHIM_SITE) { shim::wgmma_commit({"wgmma_commit", file, line}); }
template <unsigned kGroups>
void wgmma_wait(SHIM_SITE) {
  shim::wgmma_wait({"wgmma_wait", file, line}, kGroups);
}
template <unsigned kTiles>
void wgmma_settle(float (&)[kTiles][4]) {}
