// The engine of the emulation. x86-64, C++20.
//
// Lanes run one after the other in an order that a seed permutes; a lane gives way at barriers, warp collectives and
// __nanosleep only, so results that depend on the order of lanes differ between seeds. Shared memory starts as
// garbage, other garbage for each seed.
// A fault (deadlock, wrong mask, misaligned access, ...) ends the launch with a message. Strictness: all threads of a
// block must meet at the same __syncthreads, all lanes of a mask at the same shuffle or vote; lanes that have exited
// are not waited for.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>

#include "state.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

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

constinit thread_local State* g_state = nullptr;
constinit thread_local Context g_context{};
RaceHooks g_races;
bool g_report_uninitialized = false;
bool g_mma_rounds_each = false;

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr uint64_t kCanary = 0x5AFE57ACC0FFEE00u;  // at the end of every stack

static State& state() { return *g_state; }

static bool same(const Site& a, const Site& b) { return std::strcmp(a.what, b.what) == 0 && a.line == b.line; }
static std::string text(const Site& s) {
  return std::string(s.what) + " (" + s.file + ":" + std::to_string(s.line) + ")";
}

static void to_fibre(State& s, Fibre& f) {
  s.current = &f;
  g_context = {f.thread, s.block, s.block_dim, s.grid_dim, f.lane};
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack, kStackBytes);
  shim_switch(&s.scheduler, f.stack_top);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  shim_switch(&s.scheduler, f.stack_top);
#endif
}

void yield() {
  State& s = state();
#ifdef __SANITIZE_ADDRESS__
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, s.scheduler_stack, s.scheduler_stack_bytes);
  shim_switch(&s.current->stack_top, s.scheduler);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  shim_switch(&s.current->stack_top, s.scheduler);
#endif
}

static std::string place(const State& s, const Fibre& f) {
  auto triple = [](dim3 d) {
    std::string numbers = std::to_string(d.x);
    if (d.y != 0 || d.z != 0) numbers += "," + std::to_string(d.y) + "," + std::to_string(d.z);
    return numbers;
  };
  return "block " + triple(s.block) + ", thread " + triple(f.thread);
}

void fail(const std::string& message) {
  State& s = state();
  if (s.fault.empty()) s.fault = message + " (" + place(s, *s.current) + ")";
  for (;;) yield();
}
void fail(const char* message) { fail(std::string(message)); }
void fail(const Site& site, const char* message) { fail(text(site) + ": " + message); }

void touched(const void* address, size_t bytes, bool write) {
  if (g_races.access != nullptr) g_races.access(address, bytes, write);
}

size_t stack_bytes() { return kStackBytes; }

// Whether a collective has all its lanes, but for those that have exited.
static bool complete(const Collective& c, unsigned exited) {
  return c.mask != 0 && ((c.arrived | exited) & c.mask) == c.mask;
}

static bool is_syncwarp(const Site& site) { return std::strcmp(site.what, "__syncwarp") == 0; }

// A collective has its last lane. After __syncwarp, the only one that orders memory, its lanes know what the others
// did.
static void in_step(State& s, Warp& warp, const Collective& c, unsigned warp_index) {
  if (g_races.access == nullptr || !is_syncwarp(c.site)) return;
  const unsigned time = ++warp.time;
  unsigned seen[kLanes] = {};
  for (unsigned pass = 0; pass < 2; ++pass) {
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if ((c.arrived >> lane & 1) == 0) continue;
      Fibre& f = s.fibres[warp_index * kLanes + lane];
      for (unsigned other = 0; other < kLanes; ++other) {
        if (pass == 0) seen[other] = std::max(seen[other], (c.arrived >> other & 1) != 0 ? time : f.seen[other]);
        if (pass == 1) f.seen[other] = seen[other];
      }
    }
  }
}

static void fibre_main() {
  State& s = state();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_bytes);
#endif
  s.entry(s.arguments);
  Fibre& me = *s.current;
  if (!me.sums.empty()) fail("ends while products of its warpgroup are under way");
  Warp& warp = s.warps[me.warp];
  me.wait = Wait::kDone;
  --s.running;
  const unsigned exited = warp.exited | 1u << me.lane;
  for (const Collective& c : warp.collectives) {
    if (!complete(c, warp.exited) && complete(c, exited)) in_step(s, warp, c, me.warp);
  }
  warp.exited = exited;
  for (;;) yield();
}

const Collective& meet(const Site& site, unsigned mask, const uint64_t* words, unsigned count) {
  State& s = state();
  Fibre& me = *s.current;
  const unsigned bit = 1u << me.lane;
  if ((mask & bit) == 0) fail(text(site) + ": the mask leaves out a lane that calls");
  Warp& warp = s.warps[me.warp];
  Collective *open = nullptr, *free = nullptr;
  for (Collective& c : warp.collectives) {
    if (c.mask == mask && !complete(c, warp.exited) && (c.arrived & bit) == 0) open = &c;
    if (c.mask == 0 && free == nullptr) free = &c;
  }
  if (open == nullptr) {
    if (free == nullptr) fail("too many warp collectives under way at once");
    open = free;
    open->mask = mask;
    open->arrived = open->left = 0;
    open->site = site;
  }
  const bool any_line = is_syncwarp(site) && is_syncwarp(open->site);
  if (!any_line && !same(open->site, site)) {
    fail("lanes of one mask meet in " + text(open->site) + " and in " + text(site));
  }
  std::copy(words, words + count, open->values[me.lane]);
  open->arrived |= bit;
  me.joined = open;
  me.site = site;
  if (complete(*open, warp.exited)) in_step(s, warp, *open, me.warp);
  while (!complete(*open, warp.exited)) {
    me.wait = Wait::kCollective;
    yield();
  }
  me.wait = Wait::kNone;
  open->left |= bit;
  if ((open->arrived & ~open->left) == 0) open->mask = 0;
  return *open;
}

void barrier(const Site& site) {
  State& s = state();
  s.current->wait = Wait::kBarrier;
  s.current->site = site;
  for (const Fibre& other : s.fibres) {
    if (other.wait == Wait::kBarrier && !same(other.site, site)) {
      fail("threads of one block meet in " + text(other.site) + " and in " + text(site));
    }
    if (other.wait == Wait::kBarrier) break;
  }
  ++s.at_barrier;
  yield();
}

// Memory of exactly `bytes` on a 128-byte boundary, filled with garbage that depends on the seed.
static char* garbage(size_t bytes, unsigned seed) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes) != 0) std::abort();
  std::memset(memory, 0xA5 + 0x5B * seed, bytes);
  return static_cast<char*>(memory);
}

static char* make_shared_array(State& s, const char* name, size_t bytes) {
  s.shared.push_back({name, garbage(bytes, s.seed), bytes, g_races.track != nullptr ? g_races.track(bytes) : nullptr});
  return s.shared.back().begin;
}

void* shared_memory(SharedSlot& slot, const char* name, size_t bytes) {
  State& s = state();
  if (slot.generation != s.generation) {
    slot.generation = s.generation;
    slot.memory = make_shared_array(s, name, bytes);
  }
  return slot.memory;
}
void* dynamic_memory() {
  State& s = state();
  if (s.dynamic_bytes == 0) fail("the kernel uses dynamic shared memory, the launch gives it none");
  return s.shared.front().begin;
}

static bool runnable(const State& s, const Fibre& f) {
  return f.wait == Wait::kNone || (f.wait == Wait::kCollective && complete(*f.joined, s.warps[f.warp].exited)) ||
         (f.wait == Wait::kPhase && phase_is_over(*f.phases, f.parity)) ||
         (f.wait == Wait::kProducts && products_are_issued(s, f));
}

unsigned permuted(unsigned i, unsigned n, unsigned seed, unsigned round) {
  if (seed == 0) return i;
  if (seed == 1) return n - 1 - i;
  unsigned step = (2 * seed + 1) % n;
  while (std::gcd(step == 0 ? n : step, n) != 1) step = (step + 1) % n;
  return static_cast<unsigned>((static_cast<uint64_t>(i) * step + seed + round) % n);
}

static std::string deadlock(const State& s) {
  std::string message = "deadlock in block " + std::to_string(s.block.x) + ":";
  unsigned told = 0;
  const Site* last = nullptr;
  for (const Fibre& f : s.fibres) {
    if (f.wait == Wait::kNone || f.wait == Wait::kDone) continue;
    if ((last != nullptr && same(*last, f.site)) || told == 4) continue;
    last = &f.site;
    ++told;
    message += " thread " + std::to_string(f.index) + " waits in " + text(f.site) + ";";
  }
  return message + " others never come";
}

static void start_block(State& s) {
  static std::atomic<uint64_t> generations{0};
  s.generation = ++generations;
  s.running = s.threads;
  s.at_barrier = 0;
  s.barriers = 1;
  s.ticks = 0;
  s.phases.clear();
  s.warpgroups.clear();
  s.round = 0;
  if (s.dynamic_bytes != 0) make_shared_array(s, "dynamic shared memory", s.dynamic_bytes);
  for (Warp& warp : s.warps) {
    warp.exited = 0;
    warp.time = 1;
    for (Collective& c : warp.collectives) c.mask = c.arrived = c.left = 0;
  }
  if (s.threads % kLanes != 0) s.warps.back().exited = ~0u << (s.threads % kLanes);
  for (unsigned i = 0; i < s.threads; ++i) {
    Fibre& f = s.fibres[i];
    f = Fibre{};
    f.index = i;
    f.lane = i % kLanes;
    f.warp = i / kLanes;
    f.thread = {i % s.block_dim.x, i / s.block_dim.x % s.block_dim.y, i / (s.block_dim.x * s.block_dim.y)};
    f.stack = s.stacks + i * kStackBytes;
    std::memcpy(f.stack, &kCanary, sizeof(kCanary));
    void** top = reinterpret_cast<void**>(f.stack + kStackBytes - 64);
    *--top = nullptr;  // keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(&fibre_main);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    f.stack_top = top;
  }
}

void run_block() {
  State& s = state();
  start_block(s);
  const unsigned warps = static_cast<unsigned>(s.warps.size());
  const bool one_pass = s.seed > 1 && s.seed % 2 != 0;  // lets warps overtake each other in another way
  while (s.running != 0) {
    bool any = false;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned base = permuted(w, warps, s.seed, s.round) * kLanes, count = std::min(kLanes, s.threads - base);
      for (bool progress = true; progress;) {
        progress = false;
        for (unsigned i = 0; i < count; ++i) {
          Fibre& f = s.fibres[base + permuted(i, count, s.seed, s.round)];
          if (!runnable(s, f)) continue;
          to_fibre(s, f);
          if (!s.fault.empty()) return;
          if (std::memcmp(f.stack, &kCanary, sizeof(kCanary)) != 0) {
            s.fault = "stack overflow (" + place(s, f) + ")";
            return;
          }
          progress = any = true;
        }
        progress = progress && !one_pass;
      }
    }
    ++s.round;
    if (s.running != 0 && s.at_barrier == s.running) {
      s.at_barrier = 0;
      ++s.barriers;
      for (Fibre& f : s.fibres) {
        if (f.wait == Wait::kBarrier) f.wait = Wait::kNone;
      }
      any = true;
    }
    if (!any && s.running != 0) {
      s.fault = deadlock(s);
      return;
    }
  }
}

}  // namespace shim
