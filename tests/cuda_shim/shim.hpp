// Runs the kernels on a CPU: every CUDA thread is a fibre, every block runs on one OS thread. x86-64, C++20.
//
// It is force-included before a kernel text. Lanes run one after the other in an order that a seed permutes; a lane gives
// way at barriers and warp collectives only, so results that depend on the order of lanes differ between seeds. Shared
// memory starts as garbage. A fault (deadlock, wrong mask, ...) ends the launch with a message.
#pragma once
#define BITFORBIT_CUDA_SHIM 1

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __restrict__ __restrict
#define __align__(n) alignas(n)
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Saves the callee-saved registers on the current stack, stores its top in *from, goes on at the stack `to`.
extern "C" void shim_switch(void** from, void* to);
asm(R"(.text
.globl shim_switch
.hidden shim_switch
.type shim_switch,@function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size shim_switch,.-shim_switch
)");

namespace shim {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kLanes = 32;
constexpr unsigned char kPoison = 0xA5;

enum class Wait { kNone, kBarrier, kCollective, kDone };

struct Fibre {
  void* stack_top = nullptr;
  dim3 thread{};
  unsigned lane = 0, warp = 0;
  Wait wait = Wait::kNone;
  struct Collective* joined = nullptr;
};

// One meeting of the lanes of a mask. It stays until all of them have read its result.
struct Collective {
  unsigned mask = 0, arrived = 0, left = 0;
  const char* what = nullptr;
  uint64_t values[kLanes];
};

struct Warp {
  Collective collectives[2 * kLanes];
};

struct State {
  Fibre fibres[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  Fibre* current = nullptr;
  void* scheduler = nullptr;
  char* stacks = nullptr;
  dim3 block{}, block_dim{}, grid_dim{};
  unsigned threads = 0, running = 0, at_barrier = 0, seed = 0;
  uint64_t generation = 0;  // of the block: shared arrays are made anew for each
  char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::vector<void*> shared;
  std::string fault;
  void (*entry)(void**) = nullptr;
  void** arguments = nullptr;
};

inline thread_local State* g_state = nullptr;
inline State& state() { return *g_state; }
inline Fibre& self() { return *g_state->current; }

inline void yield() {
  State& s = state();
  shim_switch(&s.current->stack_top, s.scheduler);
}

// Ends the launch: this lane never runs again, nor does any other.
[[noreturn]] inline void fail(const std::string& message) {
  State& s = state();
  if (s.fault.empty()) {
    s.fault = message;
    if (s.current != nullptr) {
      s.fault += " (block " + std::to_string(s.block.x) + "," + std::to_string(s.block.y) + "," +
                 std::to_string(s.block.z) + ", thread " + std::to_string(s.current->thread.x) + ")";
    }
  }
  for (;;) yield();
}

inline void fibre_main() {
  State& s = state();
  s.entry(s.arguments);
  s.current->wait = Wait::kDone;
  --s.running;
  for (;;) yield();
}

// Every lane of the mask gives a value; returns when all have, with all values by lane.
inline void exchange(const char* what, unsigned mask, uint64_t value, uint64_t (&values)[kLanes]) {
  State& s = state();
  Fibre& me = *s.current;
  const unsigned bit = 1u << me.lane;
  if ((mask & bit) == 0) fail(std::string(what) + ": the mask leaves out a lane that calls");
  Warp& warp = s.warps[me.warp];
  Collective *open = nullptr, *free = nullptr;
  for (Collective& c : warp.collectives) {
    if (c.mask == mask && c.arrived != mask && (c.arrived & bit) == 0) open = &c;
    if (c.mask == 0 && free == nullptr) free = &c;
  }
  if (open == nullptr) {
    if (free == nullptr) fail("too many warp collectives under way at once");
    open = free;
    open->mask = mask;
    open->arrived = open->left = 0;
    open->what = what;
  }
  if (std::strcmp(open->what, what) != 0) fail(std::string("lanes meet in ") + open->what + " and in " + what);
  open->values[me.lane] = value;
  open->arrived |= bit;
  me.joined = open;
  while (open->arrived != mask) {
    me.wait = Wait::kCollective;
    yield();
  }
  me.wait = Wait::kNone;
  std::memcpy(values, open->values, sizeof(values));
  open->left |= bit;
  if (open->left == mask) open->mask = 0;
}

// Memory of a shared array; the first lane of a block that comes by makes it, uninitialized.
struct SharedSlot {
  uint64_t generation = 0;
  void* memory = nullptr;
};
inline void* shared_memory(SharedSlot& slot, size_t bytes) {
  State& s = state();
  if (slot.generation != s.generation) {
    slot.generation = s.generation;
    slot.memory = std::aligned_alloc(128, (bytes + 127) / 128 * 128);
    std::memset(slot.memory, kPoison, (bytes + 127) / 128 * 128);
    s.shared.push_back(slot.memory);
  }
  return slot.memory;
}

inline bool runnable(const Fibre& f) {
  return f.wait == Wait::kNone || (f.wait == Wait::kCollective && f.joined->arrived == f.joined->mask);
}

// i-th of n in an order that depends on the seed; seed 0: ascending.
inline unsigned permuted(unsigned i, unsigned n, unsigned seed) {
  if (seed == 0) return i;
  if (seed == 1) return n - 1 - i;
  unsigned step = (2 * seed + 1) % n;
  while (std::__gcd(step == 0 ? n : step, n) != 1) step = (step + 1) % n;
  return static_cast<unsigned>((static_cast<uint64_t>(i) * step + seed) % n);
}

inline void run_block() {
  State& s = state();
  static std::atomic<uint64_t> generations{0};
  s.generation = ++generations;
  std::memset(s.warps, 0, sizeof(s.warps));
  if (s.dynamic_bytes != 0) std::memset(s.dynamic, kPoison, s.dynamic_bytes);
  s.running = s.threads;
  s.at_barrier = 0;
  for (unsigned i = 0; i < s.threads; ++i) {
    Fibre& f = s.fibres[i];
    f = Fibre{};
    f.lane = i % kLanes;
    f.warp = i / kLanes;
    f.thread = {i % s.block_dim.x, i / s.block_dim.x % s.block_dim.y, i / (s.block_dim.x * s.block_dim.y)};
    void** top = reinterpret_cast<void**>(s.stacks + (i + 1) * kStackBytes - 64);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&fibre_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    f.stack_top = top;
  }
  const unsigned warps = (s.threads + kLanes - 1) / kLanes;
  while (s.running != 0) {
    bool any = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned base = permuted(w, warps, s.seed) * kLanes, count = std::min(kLanes, s.threads - base);
      for (bool progress = true; progress;) {
        progress = false;
        for (unsigned i = 0; i < count; ++i) {
          Fibre& f = s.fibres[base + permuted(i, count, s.seed)];
          if (!runnable(f)) continue;
          s.current = &f;
          shim_switch(&s.scheduler, f.stack_top);
          if (!s.fault.empty()) return;
          progress = any = true;
        }
      }
    }
    if (s.running != 0 && s.at_barrier == s.running) {
      s.at_barrier = 0;
      for (unsigned i = 0; i < s.threads; ++i) {
        if (s.fibres[i].wait == Wait::kBarrier) s.fibres[i].wait = Wait::kNone;
      }
      any = true;
    }
    if (!any && s.running != 0) {
      s.current = nullptr;
      s.fault = "deadlock: lanes wait for others that never come (block " + std::to_string(s.block.x) + ")";
      return;
    }
  }
}

// --- what the harness calls ------------------------------------------------------------------------------------------

struct KernelEntry {
  const char* name;
  void (*call)(void**);
  std::vector<size_t> parameter_bytes;
};
inline std::vector<KernelEntry>& kernels() {
  static std::vector<KernelEntry> all;
  return all;
}

template <auto kFunction>
struct Call;
template <class... A, void (*kFunction)(A...)>
struct Call<kFunction> {
  template <size_t... I>
  static void with(void** arguments, std::index_sequence<I...>) {
    kFunction(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
  }
  static void call(void** arguments) { with(arguments, std::index_sequence_for<A...>{}); }
  static std::vector<size_t> bytes() { return {sizeof(A)...}; }
};

struct Register {
  Register(const char* name, void (*call)(void**), std::vector<size_t> bytes) { kernels().push_back({name, call, bytes}); }
};
#define SHIM_KERNEL(name) \
  static shim::Register shim_register_##name{#name, &shim::Call<&name>::call, shim::Call<&name>::bytes()};

inline const KernelEntry* find(const char* name) {
  for (const KernelEntry& k : kernels()) {
    if (std::strcmp(k.name, name) == 0) return &k;
  }
  return nullptr;
}

inline std::string launch(const KernelEntry& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void** arguments,
                          unsigned seed, unsigned os_threads) {
  const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > kMaxThreads) return "invalid launch configuration";
  std::atomic<unsigned> next{0};
  std::vector<std::string> faults(os_threads);
  auto work = [&](unsigned worker) {
    auto owned = std::make_unique<State>();
    State& s = *owned;
    g_state = &s;
    s.stacks = static_cast<char*>(mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    s.dynamic_bytes = dynamic_bytes;
    if (dynamic_bytes != 0) s.dynamic = static_cast<char*>(std::aligned_alloc(128, (dynamic_bytes + 127) / 128 * 128));
    s.grid_dim = grid;
    s.block_dim = block;
    s.threads = threads;
    s.seed = seed;
    s.entry = kernel.call;
    s.arguments = arguments;
    for (unsigned i; s.fault.empty() && (i = next++) < blocks;) {
      const unsigned b = permuted(i, blocks, seed);
      s.block = {b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y)};
      run_block();
      for (void* memory : s.shared) std::free(memory);
      s.shared.clear();
    }
    faults[worker] = s.fault;
    munmap(s.stacks, kMaxThreads * kStackBytes);
    std::free(s.dynamic);
    g_state = nullptr;
  };
  std::vector<std::thread> pool;
  for (unsigned w = 0; w < os_threads; ++w) pool.emplace_back(work, w);
  for (std::thread& t : pool) t.join();
  for (const std::string& fault : faults) {
    if (!fault.empty()) return fault;
  }
  return "";
}

}  // namespace shim

extern "C" {
// Bytes of the parameters of a kernel into `bytes` (room for 64); returns their number, or -1 for an unknown kernel.
inline __attribute__((used, visibility("default"))) int shim_parameters(const char* name, size_t* bytes) {
  const shim::KernelEntry* kernel = shim::find(name);
  if (kernel == nullptr) return -1;
  std::copy(kernel->parameter_bytes.begin(), kernel->parameter_bytes.end(), bytes);
  return static_cast<int>(kernel->parameter_bytes.size());
}
// Runs a kernel to its end. Returns 0, or 1 with a message.
inline __attribute__((used, visibility("default"))) int shim_launch(const char* name, const unsigned* grid,
                                                                    const unsigned* block, size_t dynamic_bytes,
                                                                    void** arguments, unsigned seed,
                                                                    unsigned os_threads, char* message,
                                                                    size_t message_bytes) {
  const shim::KernelEntry* kernel = shim::find(name);
  const std::string fault =
      kernel == nullptr ? std::string("no such kernel")
                        : shim::launch(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                                       dynamic_bytes, arguments, seed, os_threads);
  std::snprintf(message, message_bytes, "%s", fault.c_str());
  return fault.empty() ? 0 : 1;
}
}

// --- CUDA C++ ----------------------------------------------------------------------------------------------------------

#define threadIdx (shim::self().thread)
#define blockIdx (shim::state().block)
#define blockDim (shim::state().block_dim)
#define gridDim (shim::state().grid_dim)

#define SHARED(type, name, count)                  \
  static thread_local shim::SharedSlot name##_slot; \
  type* const name = static_cast<type*>(shim::shared_memory(name##_slot, sizeof(type) * (count)))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(shim::state().dynamic)

inline void __syncthreads() {
  shim::State& s = shim::state();
  s.current->wait = shim::Wait::kBarrier;
  ++s.at_barrier;
  shim::yield();
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  uint64_t values[shim::kLanes];
  shim::exchange("__syncwarp", mask, 0, values);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace shim {
template <class T>
T shuffle(const char* what, unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0, values[kLanes];
  std::memcpy(&bits, &value, sizeof(T));
  exchange(what, mask, bits, values);
  if ((mask >> source & 1) == 0) fail(std::string(what) + ": reads from a lane outside of the mask");
  std::memcpy(&value, &values[source], sizeof(T));
  return value;
}
}  // namespace shim

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, with a generic address: ldmatrix.cuh has the meaning.
inline uint4 ldmatrix_x4(const void* row) {
  uint64_t rows[shim::kLanes];
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("misaligned ldmatrix");
  shim::exchange("ldmatrix", 0xFFFFFFFFu, reinterpret_cast<uintptr_t>(row), rows);
  const unsigned lane = shim::self().lane;
  unsigned words[4];
  for (unsigned k = 0; k < 4; ++k) {
    std::memcpy(&words[k], reinterpret_cast<const char*>(rows[8 * k + lane / 4]) + 4 * (lane % 4), 4);
  }
  shim::exchange("ldmatrix", 0xFFFFFFFFu, 0, rows);  // no lane goes on before all have read
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(shim::self().lane);
  return shim::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = shim::self().lane, at = lane & (width - 1);
  return shim::shuffle("__shfl_up_sync", mask, value, at >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = shim::self().lane, at = lane & (width - 1);
  return shim::shuffle("__shfl_down_sync", mask, value, at + delta < unsigned(width) ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = shim::self().lane, source = lane ^ unsigned(bits);
  return shim::shuffle("__shfl_xor_sync", mask, value, (source ^ lane) < unsigned(width) ? source : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  uint64_t values[shim::kLanes];
  shim::exchange("__ballot_sync", mask, predicate != 0, values);
  unsigned ballot = 0;
  for (unsigned i = 0; i < shim::kLanes; ++i) {
    if (mask >> i & 1) ballot |= unsigned(values[i]) << i;
  }
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
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
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned field = selector >> (4 * i) & 15, byte = unsigned(bytes >> (8 * (field & 7))) & 255;
    result |= ((field & 8) != 0 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
  }
  return result;
}

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* address, T value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* address, T value) {
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(address, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T load_once(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) shim::fail("misaligned load");
  return *address;
}
template <class T>
void store_once(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) shim::fail("misaligned store");
  *address = value;
}
template <class T>
T __ldg(const T* address) {
  return load_once(address);
}
using std::max;
using std::min;
