// What a kernel text may use of CUDA C++, on a CPU: included before the text. The engine is fibres.hpp, launches are
// launch.hpp.
#pragma once
#define BITFORBIT_CUDA_SHIM 1

#include <algorithm>
#include <atomic>

#include "fibres.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#define threadIdx (shim::g_context.thread)
#define blockIdx (shim::g_context.block)
#define blockDim (shim::g_context.block_dim)
#define gridDim (shim::g_context.grid_dim)

#define SHARED(type, name, count)                   \
  static thread_local shim::SharedSlot name##_slot; \
  type* const name = static_cast<type*>(shim::shared_memory(name##_slot, #name, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(shim::dynamic_memory())

// --- barriers and warp collectives; the last two parameters tell where the text calls --------------------------------

#define SHIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_SITE) { shim::barrier({"__syncthreads", file, line}); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SHIM_SITE) {
  shim::meet({"__syncwarp", file, line}, mask, nullptr, 0);
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { shim::yield(); }

namespace shim {
template <class T>
T shuffle(const Site& site, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Collective& all = meet(site, mask, &bits, 1);
  if ((all.arrived >> source & 1) == 0) fail(site, "reads from a lane outside of the mask, or that has exited");
  std::memcpy(&value, all.values[source], sizeof(T));
  return value;
}

// Folds the values of the lanes of a mask, in the order of lanes.
template <class T, class F>
T reduce(const Site& site, unsigned mask, T value, F fold) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Collective& all = meet(site, mask, &bits, 1);
  bool first = true;
  for (unsigned i = 0; i < kLanes; ++i) {
    if ((all.arrived >> i & 1) == 0) continue;
    T other;
    std::memcpy(&other, all.values[i], sizeof(T));
    value = first ? other : fold(value, other);
    first = false;
  }
  return value;
}
}  // namespace shim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_SITE) {
  const int lane = static_cast<int>(shim::g_context.lane);
  const unsigned from = (lane & ~(width - 1)) | (source & (width - 1));
  return shim::shuffle({"__shfl_sync", file, line}, mask, value, from);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
  const unsigned lane = shim::g_context.lane, at = lane & (width - 1);
  return shim::shuffle({"__shfl_up_sync", file, line}, mask, value, at >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SHIM_SITE) {
  const unsigned lane = shim::g_context.lane, at = lane & (width - 1);
  return shim::shuffle({"__shfl_down_sync", file, line}, mask, value,
                       at + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_SITE) {
  const unsigned lane = shim::g_context.lane, source = lane ^ unsigned(bits);
  return shim::shuffle({"__shfl_xor_sync", file, line}, mask, value, (source ^ lane) < unsigned(width) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_SITE) {
  const unsigned bit = predicate != 0 ? 1u << shim::g_context.lane : 0;
  return shim::reduce({"__ballot_sync", file, line}, mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, SHIM_SITE) {
  return shim::reduce({"__any_sync", file, line}, mask, int(predicate != 0), [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, SHIM_SITE) {
  return shim::reduce({"__all_sync", file, line}, mask, int(predicate != 0), [](int a, int b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SHIM_SITE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const shim::Collective& all = shim::meet({"__match_any_sync", file, line}, mask, &bits, 1);
  unsigned same = 0;
  for (unsigned i = 0; i < shim::kLanes; ++i) same |= unsigned((all.arrived >> i & 1) && all.values[i][0] == bits) << i;
  return same;
}
inline unsigned __activemask() { return 1u << shim::g_context.lane; }  // all that is ever promised

// sm_80 and later: on 32-bit values.
#define SHIM_REDUCE(name, type, expression)                                                                   \
  inline type name(unsigned mask, type value, SHIM_SITE) {                                                    \
    return shim::reduce({#name, file, line}, mask, value, [](type a, type b) -> type { return expression; }); \
  }
SHIM_REDUCE(__reduce_add_sync, unsigned, a + b)
SHIM_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
SHIM_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
SHIM_REDUCE(__reduce_add_sync, int, int(unsigned(a) + unsigned(b)))
SHIM_REDUCE(__reduce_min_sync, int, a < b ? a : b)
SHIM_REDUCE(__reduce_max_sync, int, a > b ? a : b)
SHIM_REDUCE(__reduce_and_sync, unsigned, a& b)
SHIM_REDUCE(__reduce_or_sync, unsigned, a | b)
SHIM_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef SHIM_REDUCE

// --- integers --------------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned field = selector >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (field & 7))) & 255;
    result |= ((field & 8) != 0 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Atomics on 32 and 64 bits; each returns the old value.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
  } else {
    T old = *address;
    for (T sum = old + value;
         !__atomic_compare_exchange(address, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);) {
      sum = old + value;
    }
    return old;
  }
}
#define SHIM_ATOMIC(name, builtin)                    \
  template <class T>                                  \
  T name(T* address, std::type_identity_t<T> value) { \
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);  \
    return builtin(address, value, __ATOMIC_RELAXED); \
  }
SHIM_ATOMIC(atomicSub, __atomic_fetch_sub)
SHIM_ATOMIC(atomicOr, __atomic_fetch_or)
SHIM_ATOMIC(atomicAnd, __atomic_fetch_and)
SHIM_ATOMIC(atomicXor, __atomic_fetch_xor)
SHIM_ATOMIC(atomicExch, __atomic_exchange_n)
#undef SHIM_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  __atomic_compare_exchange_n(address, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T load_once(const T* address) {
  return *address;
}
template <class T>
void store_once(T* address, T value) {
  *address = value;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
using std::max;
using std::min;

#include "async.hpp"
#include "bf16x2.hpp"
#include "wgmma.hpp"
