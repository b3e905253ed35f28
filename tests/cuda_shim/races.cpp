// The race detector for shared memory: takes the calls that -fsanitize=thread puts before every load and store of a
// kernel text. Linked without that sanitizer's own runtime, itself built without the flag.
//
// Two accesses of one byte by different threads, one of them a write and not both atomic, are a race unless
// __syncthreads lies between them, or, within a warp, __syncwarp through which one lane has come to know of the other's
// access; shuffles and votes do not order memory. Who has waited for a phase of an mbarrier is taken to know all that
// was done before the phase ended. On request, a byte that is read before any thread wrote it is reported too.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "state.hpp"

namespace shim {

// What happened last to one byte. Thread numbers are plus one, so that zeros mean never.
struct Cell {
  unsigned write_barriers, write_time;
  unsigned write_tick, read_tick;
  unsigned write_fences;  // calls of fence_async by its thread before
  unsigned short write_thread;
  unsigned short read_warp;  // plus one; kSeveral: more than one warp
  unsigned read_barriers, read_time, read_lanes;
  bool write_atomic, read_atomic;
};

namespace {

constexpr unsigned short kSeveral = 0xFFFF;

Cell* track(size_t bytes) { return static_cast<Cell*>(std::calloc(std::max<size_t>(bytes, 1), sizeof(Cell))); }
void forget(Cell* cells) { std::free(cells); }

// Whether the current lane knows of what lane `lane` of its own warp did at `time`.
bool knows(const Fibre& me, unsigned lane, unsigned time) { return lane == me.lane || me.seen[lane] > time; }

bool after_write(const State& s, const Fibre& me, const Cell& cell) {
  if (cell.write_thread == 0 || cell.write_barriers != s.barriers || cell.write_tick < me.acquired) return true;
  const unsigned thread = cell.write_thread - 1u;
  return thread / kLanes == me.warp && knows(me, thread % kLanes, cell.write_time);
}

bool after_reads(const State& s, const Fibre& me, const Cell& cell) {
  if (cell.read_warp == 0 || cell.read_barriers != s.barriers || cell.read_tick < me.acquired) return true;
  if (cell.read_warp == kSeveral || cell.read_warp - 1u != me.warp) return false;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((cell.read_lanes >> lane & 1) != 0 && !knows(me, lane, cell.read_time)) return false;
  }
  return true;
}

void note_read(const State& s, const Fibre& me, Cell& cell, unsigned time, bool atomic) {
  const unsigned short warp = static_cast<unsigned short>(me.warp + 1);
  if (after_reads(s, me, cell)) {  // reads before this one that matter no more
    cell.read_warp = warp;
    cell.read_lanes = 0;
    cell.read_atomic = true;
  } else if (cell.read_warp != warp) {
    cell.read_warp = kSeveral;
  }
  cell.read_barriers = s.barriers;
  cell.read_time = time;
  cell.read_tick = s.ticks;
  cell.read_lanes |= 1u << me.lane;
  cell.read_atomic = cell.read_atomic && atomic;
}

[[noreturn]] void report(const Shared& array, size_t at, const std::string& what) {
  fail("shared array " + std::string(array.name) + ", byte " + std::to_string(at) + ": " + what);
}

void check(const Shared& array, size_t at, bool read, bool write, bool atomic) {
  State& s = *g_state;
  const Fibre& me = *s.current;
  const unsigned time = s.warps[me.warp].time;
  Cell& cell = array.cells[at];
  if (read && cell.write_thread == 0 && g_report_uninitialized)
    report(array, at, "read before any thread of the block wrote it");
  if (!(atomic && cell.write_atomic) && !after_write(s, me, cell)) {
    report(array, at,
           std::string("race, ") + (write ? "written" : "read") + " without synchronisation after thread " +
               std::to_string(cell.write_thread - 1) + " wrote it");
  }
  if (write) {
    if (!(atomic && cell.read_atomic) && !after_reads(s, me, cell)) {
      report(array, at, "race, written without synchronisation after other threads read it");
    }
    cell.write_barriers = s.barriers;
    cell.write_time = time;
    cell.write_tick = s.ticks;
    cell.write_thread = static_cast<unsigned short>(me.index + 1);
    cell.write_atomic = atomic;
    cell.write_fences = me.fences;
  }
  if (read) note_read(s, me, cell, time, atomic);
}

void access(const void* address, size_t bytes, bool read, bool write, bool atomic) {
  if (g_state == nullptr || g_state->current == nullptr) return;
  const char* at = static_cast<const char*>(address);
  for (const Shared& array : g_state->shared) {
    if (at < array.begin || at >= array.begin + array.bytes) continue;
    const size_t first = static_cast<size_t>(at - array.begin);
    if (bytes > array.bytes - first) report(array, first, "access past its end");
    for (size_t i = 0; i < bytes; ++i) check(array, first + i, read, write, atomic);
    return;
  }
}

// A tensor core, which sees what threads wrote once these have called fence_async.
void access_by_proxy(const void* address, size_t bytes) {
  const State& s = *g_state;
  const char* at = static_cast<const char*>(address);
  for (const Shared& array : s.shared) {
    if (at < array.begin || at >= array.begin + array.bytes) continue;
    for (size_t i = at - array.begin; i < at - array.begin + bytes; ++i) {
      const Cell& cell = array.cells[i];
      if (cell.write_thread != 0 && s.fibres[cell.write_thread - 1].fences == cell.write_fences) {
        report(array, i,
               "read by a tensor core, without fence_async after thread " + std::to_string(cell.write_thread - 1) +
                   " wrote it");
      }
    }
  }
  access(address, bytes, true, false, false);
}

const bool installed = [] {
  g_races = {track, forget,
             [](const void* address, size_t bytes, bool write) { access(address, bytes, !write, write, false); },
             access_by_proxy};
  return true;
}();

}  // namespace
}  // namespace shim

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, unsigned long bytes) { shim::access(p, bytes, true, false, false); }
void __tsan_write_range(void* p, unsigned long bytes) { shim::access(p, bytes, false, true, false); }
#define SHIM_ACCESS(bytes)                                                                    \
  void __tsan_read##bytes(void* p) { shim::access(p, bytes, true, false, false); }            \
  void __tsan_write##bytes(void* p) { shim::access(p, bytes, false, true, false); }           \
  void __tsan_unaligned_read##bytes(void* p) { shim::access(p, bytes, true, false, false); }  \
  void __tsan_unaligned_write##bytes(void* p) { shim::access(p, bytes, false, true, false); } \
  void __tsan_volatile_read##bytes(void* p) { shim::access(p, bytes, true, false, false); }   \
  void __tsan_volatile_write##bytes(void* p) { shim::access(p, bytes, false, true, false); }
SHIM_ACCESS(1)
SHIM_ACCESS(2)
SHIM_ACCESS(4)
SHIM_ACCESS(8)
SHIM_ACCESS(16)

void __tsan_atomic_thread_fence(int) { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __tsan_atomic_signal_fence(int) {}
#define SHIM_FETCH(bits, type, operation)                                           \
  type __tsan_atomic##bits##_fetch_##operation(volatile type* p, type value, int) { \
    shim::access(const_cast<const type*>(p), sizeof(type), true, true, true);       \
    return __atomic_fetch_##operation(p, value, __ATOMIC_SEQ_CST);                  \
  }
#define SHIM_ATOMICS(bits, type)                                                                              \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                              \
    shim::access(const_cast<const type*>(p), sizeof(type), true, false, true);                                \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                           \
  void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                                       \
    shim::access(const_cast<const type*>(p), sizeof(type), false, true, true);                                \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                           \
  type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) {                                    \
    shim::access(const_cast<const type*>(p), sizeof(type), true, true, true);                                 \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                           \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile type* p, type* expected, type value, int, int) { \
    shim::access(const_cast<const type*>(p), sizeof(type), true, true, true);                                 \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }                                                                                                           \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile type* p, type* expected, type value, int, int) {   \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, value, 0, 0);                           \
  }                                                                                                           \
  type __tsan_atomic##bits##_compare_exchange_val(volatile type* p, type expected, type value, int, int) {    \
    __tsan_atomic##bits##_compare_exchange_strong(p, &expected, value, 0, 0);                                 \
    return expected;                                                                                          \
  }                                                                                                           \
  SHIM_FETCH(bits, type, add)                                                                                 \
  SHIM_FETCH(bits, type, sub)                                                                                 \
  SHIM_FETCH(bits, type, and)                                                                                 \
  SHIM_FETCH(bits, type, or)                                                                                  \
  SHIM_FETCH(bits, type, xor)
SHIM_ATOMICS(8, unsigned char)
SHIM_ATOMICS(16, unsigned short)
SHIM_ATOMICS(32, unsigned)
SHIM_ATOMICS(64, unsigned long)
}
