// Names that the kernels use, so that one text compiles with NVRTC, which knows no headers, and for the emulation on a
// CPU (tests/cuda_shim), which defines BITFORBIT_CUDA_SHIM and brings its own versions of the functions.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;
using i64 = long long;

constexpr u32 kWarp = 32;
constexpr u32 kAllLanes = 0xFFFFFFFFu;

#ifndef BITFORBIT_CUDA_SHIM

// An array in shared memory; the block's dynamic shared memory, on a 128-byte boundary.
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(128) type name[]

// Loads and stores of data that is used once: first to leave the caches.
template <class T>
__device__ __forceinline__ T load_once(const T* address) {
  return __ldcs(address);
}

template <class T>
__device__ __forceinline__ void store_once(T* address, T value) {
  __stcs(address, value);
}

#endif
