// What a kernel text may use of CUDA C++, on a CPU: included before the text. The engine is fibres.hpp, launches are
// launch.hpp.
#pragma once
#define BITFORBIT_CUDA_SHIM 1

#include <algorithm>
#include <atomic>
#include <bit>
#include <vector>

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

// --- products of fragments: mma.cuh has the meaning ------------------------------------------------------------------

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32. How the hardware sums is not documented; here an element of C is
// summed in FP64, first the accumulator, then the products in the order of k, and rounded to FP32 once.
inline void mma_bf16(float (&c)[4], uint4 a, unsigned b0, unsigned b1, SHIM_SITE) {
  const uint64_t words[3] = {uint64_t(a.y) << 32 | a.x, uint64_t(a.w) << 32 | a.z, uint64_t(b1) << 32 | b0};
  const shim::Collective& all = shim::meet({"mma", file, line}, 0xFFFFFFFFu, words, 3);
  if (all.arrived != 0xFFFFFFFFu) shim::fail("mma: a lane has exited");
  const auto bf16 = [](uint64_t word, unsigned half) {
    return double(std::bit_cast<float>(unsigned(word >> (16 * half)) << 16));
  };
  const unsigned q = shim::g_context.lane / 4, t = shim::g_context.lane % 4;
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = q + 8 * (e / 2), column = 2 * t + e % 2;
    double sum = c[e];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned lane = k % 8 / 2, half = k % 2, high = k / 8;
      sum += bf16(all.values[4 * (row % 8) + lane][high], 2 * (row / 8) + half) *
             bf16(all.values[4 * column + lane][2], 2 * high + half);
    }
    c[e] = float(sum);
  }
}
inline unsigned short to_bf16(float value) {
  const unsigned bits = std::bit_cast<unsigned>(value);
  return value != value ? 0x7FFF : static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// --- cp.async: async.cuh has the meaning -----------------------------------------------------------------------------

namespace shim {

// Copies take effect as late as they may: when their thread waits for them. Until then there is garbage.
struct Copy {
  char* to;
  const char* from;  // nullptr: zeros
};
struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
inline Copies& copies() {
  static thread_local SharedSlot slot;
  static thread_local std::vector<Copies> threads;
  const uint64_t generation = slot.generation;
  shared_memory(slot, "copies on their way", 1);
  const Context& c = g_context;
  if (slot.generation != generation) threads.assign(c.block_dim.x * c.block_dim.y * c.block_dim.z, {});
  return threads[c.thread.x + c.block_dim.x * (c.thread.y + c.block_dim.y * c.thread.z)];
}

}  // namespace shim

inline void copy_async_or_zeros(void* to, const void* from, bool copy) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (copy && reinterpret_cast<uintptr_t>(from) % 16 != 0)) {
    shim::fail("misaligned cp.async");
  }
  shim::touched(to, 16, true);
  std::memset(to, 0xC5, 16);
  shim::copies().open.push_back({static_cast<char*>(to), copy ? static_cast<const char*>(from) : nullptr});
}
inline void copy_async(void* to, const void* from) { copy_async_or_zeros(to, from, true); }
inline void commit_copies() {
  shim::Copies& mine = shim::copies();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}
template <unsigned kGroups>
void await_copies() {
  auto& groups = shim::copies().groups;
  const size_t done = groups.size() > kGroups ? groups.size() - kGroups : 0;
  for (size_t g = 0; g < done; ++g) {
    for (const shim::Copy& copy : groups[g]) {
      shim::touched(copy.to, 16, true);
      if (copy.from == nullptr) {
        std::memset(copy.to, 0, 16);
      } else {
        std::memcpy(copy.to, copy.from, 16);
      }
    }
  }
  groups.erase(groups.begin(), groups.begin() + done);
}

// --- bulk copies: async.cuh has the meaning --------------------------------------------------------------------------

namespace shim {

// A barrier's word: [0] phase, [1] nothing has arrived in it yet, [63:32] announced bytes that are not there yet.
inline unsigned long long barrier_word(unsigned long long* barrier) {
  return __atomic_load_n(barrier, __ATOMIC_RELAXED);
}
inline void change_barrier(unsigned long long* barrier, bool arrives, int64_t bytes) {
  unsigned long long word = barrier_word(barrier) + (static_cast<unsigned long long>(bytes) << 32);
  if (arrives && (word & 2) == 0) fail("mbarrier: a second arrival in one phase");
  if (arrives) word &= ~2ull;
  if ((word & 2) == 0 && word >> 32 == 0) word = (word ^ 1) | 2;
  __atomic_store_n(barrier, word, __ATOMIC_RELAXED);
}

// Copies take effect when a thread waits for their barrier. Until then there is garbage.
struct BulkCopy {
  char* to;
  const char* from;
  unsigned bytes;
  unsigned long long* barrier;
};
inline std::vector<BulkCopy>& bulk_copies() {
  static thread_local SharedSlot slot;
  static thread_local std::vector<BulkCopy> all;
  const uint64_t generation = slot.generation;
  shared_memory(slot, "bulk copies on their way", 1);
  if (slot.generation != generation) all.clear();
  return all;
}

}  // namespace shim

inline void init_barrier(unsigned long long* barrier) { __atomic_store_n(barrier, 2ull, __ATOMIC_RELAXED); }
inline void expect_bytes(unsigned long long* barrier, unsigned bytes) { shim::change_barrier(barrier, true, bytes); }
inline void copy_bulk(void* to, const void* from, unsigned bytes, unsigned long long* barrier) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16 != 0) {
    shim::fail("misaligned cp.async.bulk");
  }
  shim::touched(to, bytes, true);
  std::memset(to, 0xC5, bytes);
  shim::bulk_copies().push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, barrier});
}
inline void await_phase(unsigned long long* barrier, unsigned phase) {
  auto& copies = shim::bulk_copies();
  for (unsigned rounds = 0; (shim::barrier_word(barrier) & 1) == phase; ++rounds) {
    for (size_t i = 0; i < copies.size();) {
      const shim::BulkCopy copy = copies[i];
      if (copy.barrier != barrier) {
        ++i;
        continue;
      }
      copies.erase(copies.begin() + i);
      shim::touched(copy.to, copy.bytes, true);
      std::memcpy(copy.to, copy.from, copy.bytes);
      shim::change_barrier(barrier, false, -int64_t{copy.bytes});
    }
    if ((shim::barrier_word(barrier) & 1) != phase) break;
    if (rounds == 100000) shim::fail("mbarrier: waits for ever");
    shim::yield();
  }
}

// --- shuffles and votes
// -----------------------------------------------------------------------------------------------

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

// --- memory
// ------------------------------------------------------------------------------------------------------------

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
