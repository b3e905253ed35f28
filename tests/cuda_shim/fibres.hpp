// What the emulation of CUDA's own functions (shim.hpp) needs of its engine (fibres.cpp): every CUDA thread is a fibre,
// every block runs on one OS thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x, y, z;
};

namespace shim {

constexpr unsigned kLanes = 32;
constexpr unsigned kPayloadWords = 8;

// Where in a kernel text a lane waits.
struct Site {
  const char* what = nullptr;
  const char* file = nullptr;
  int line = 0;
};

// One meeting of the lanes of a mask. It stays until all of them have read its result.
struct Collective {
  unsigned mask = 0, arrived = 0, left = 0;
  Site site;
  uint64_t values[kLanes][kPayloadWords];
};

// The thread that runs, as the kernel text sees it.
struct Context {
  dim3 thread, block, block_dim, grid_dim;
  unsigned lane;
};
extern constinit thread_local Context g_context;

// Ends the launch: this lane never runs again, nor does any other.
[[noreturn]] void fail(const char* message);
[[noreturn]] void fail(const Site& site, const char* message);

// Lets other lanes run.
void yield();

// Every lane of the mask gives some words; returns when all have. The words of all lanes stay until the next yield.
const Collective& meet(const Site& site, unsigned mask, const uint64_t* words, unsigned count);

// Returns when all threads of the block that have not exited wait here.
void barrier(const Site& site);

// Memory of a shared array; the first lane of a block that comes by makes it, uninitialized.
struct SharedSlot {
  uint64_t generation = 0;
  void* memory = nullptr;
};
void* shared_memory(SharedSlot& slot, const char* name, size_t bytes);
void* dynamic_memory();

// Tells the race detector of shared memory that the emulation reads or writes on behalf of the current lane.
void touched(const void* address, size_t bytes, bool write);

// Copies under way and mbarriers: copies.cpp. async.cuh says what they do.
void copy_async(void* smem, const void* gmem, unsigned bytes, unsigned valid);
void copy_async_commit();
void copy_async_wait(unsigned pending);
void mbarrier_init(void* barrier, unsigned count);
void mbarrier_arrive(void* barrier, unsigned bytes);
void mbarrier_wait(const Site& site, void* barrier, unsigned parity);
void copy_bulk(void* smem, const void* gmem, unsigned bytes, void* barrier);

void fence_async();

// Products of warpgroups: wgmma.cpp. wgmma.cuh says what they do.
unsigned shared_address(const void* smem);
void wgmma(const Site& site, float* sum, unsigned tiles, const unsigned* a, uint64_t descriptor, bool is_f16);
void wgmma_fence(const Site& site);
void wgmma_commit(const Site& site);
void wgmma_wait(const Site& site, unsigned groups);

// A row of A times a column of B, added to c. Products of BF16 or FP16 are exact in FP32. How the hardware sums is not
// documented; here in FP64, first c, then the products in the order of k, rounded once; or, if the launch asks for it,
// so in FP32.
extern bool g_mma_rounds_each;
inline float dot16(const float (&row)[16], const float (&column)[16], float c) {
  double sum = c;
  for (unsigned k = 0; k < 16; ++k) {
    sum += double(row[k]) * column[k];
    if (g_mma_rounds_each) sum = float(sum);
  }
  return float(sum);
}

// --- entry points of a text ------------------------------------------------------------------------------------------

template <auto kFunction>
struct Call;
template <class... A, void (*kFunction)(A...)>
struct Call<kFunction> {
  template <size_t... I>
  static void with(void** arguments, std::index_sequence<I...>) {
    kFunction(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
  }
  static void call(void** arguments) { with(arguments, std::index_sequence_for<A...>{}); }
  static constexpr size_t kBytes[] = {0, sizeof(A)...};  // the zero: an array has at least one element
};

struct Register {
  Register(const char* name, void (*call)(void**), const size_t* parameter_bytes, size_t parameters,
           unsigned max_threads);
};
// After the kernel text: makes an entry point known, with its __launch_bounds__.
#define SHIM_KERNEL(name, max_threads)                                                                       \
  static shim::Register shim_register_##name{#name, &shim::Call<&name>::call, shim::Call<&name>::kBytes + 1, \
                                             std::size(shim::Call<&name>::kBytes) - 1, max_threads};

}  // namespace shim
