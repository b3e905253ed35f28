// Copies that go on while threads do other things, and the mbarriers that tell of their end: what async.cuh promises.
//
// A copy may take effect at any time until it is waited for. Seeds that are odd make it at once, which shows that what
// it overwrites was still in use; others as late as can be, which shows that nobody waited: until then there is
// garbage.
#include <algorithm>
#include <string>

#include "state.hpp"

namespace shim {

static bool at_once(const State& s) { return s.seed % 2 != 0; }

static bool in_shared(const State& s, const void* address, size_t bytes) {
  const char* at = static_cast<const char*>(address);
  return std::any_of(s.shared.begin(), s.shared.end(),
                     [&](const Shared& array) { return at >= array.begin && at + bytes <= array.begin + array.bytes; });
}

// On behalf of the thread that started the copy.
static void perform(State& s, const Copy& copy) {
  Fibre* const now = s.current;
  s.current = copy.by;
  touched(copy.to, copy.bytes, true);
  s.current = now;
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(copy.to + copy.valid, 0, copy.bytes - copy.valid);
}

static Copy checked(const char* what, void* smem, const void* gmem, unsigned bytes, unsigned valid,
                    unsigned alignment) {
  State& s = *g_state;
  const uintptr_t both = reinterpret_cast<uintptr_t>(smem) | reinterpret_cast<uintptr_t>(gmem);
  if (both % alignment != 0 || bytes % alignment != 0) fail(std::string(what) + ": misaligned address or size");
  if (!in_shared(s, smem, bytes)) fail(std::string(what) + ": the destination is not in shared memory");
  if (valid > bytes) fail(std::string(what) + ": more bytes to read than to copy");
  return {static_cast<char*>(smem), static_cast<const char*>(gmem), bytes, valid, s.current};
}

void copy_async(void* smem, const void* gmem, unsigned bytes, unsigned valid) {
  const Copy copy = checked("copy_async", smem, gmem, bytes, valid, bytes);
  if (at_once(*g_state)) {
    perform(*g_state, copy);
  } else {
    touched(smem, bytes, true);
    std::memset(smem, 0xC5, bytes);
    g_state->current->started.push_back(copy);
  }
}

void copy_async_commit() {
  Fibre& me = *g_state->current;
  me.groups.push_back(std::move(me.started));
  me.started.clear();
}

void copy_async_wait(unsigned pending) {
  Fibre& me = *g_state->current;
  while (me.groups.size() > pending) {
    for (const Copy& copy : me.groups.front()) perform(*g_state, copy);
    me.groups.erase(me.groups.begin());
  }
}

static Phases& phases_of(const void* barrier) {
  State& s = *g_state;
  const auto found = s.phases.find(barrier);
  if (found == s.phases.end()) fail("an mbarrier that was not initialized");
  return found->second;
}

// A phase ends when nothing is missing.
static void advance(State& s, Phases& phases) {
  if (phases.missing != 0 || phases.bytes != 0) return;
  phases.missing = phases.count;
  ++phases.complete;
  phases.tick = ++s.ticks;
}

static void perform_all(State& s, Phases& phases) {
  for (const Copy& copy : phases.copies) {
    perform(s, copy);
    phases.bytes -= copy.bytes;
  }
  phases.copies.clear();
  advance(s, phases);
}

void mbarrier_init(void* barrier, unsigned count) {
  State& s = *g_state;
  if (reinterpret_cast<uintptr_t>(barrier) % 8 != 0 || !in_shared(s, barrier, 8)) {
    fail("an mbarrier must lie in shared memory, on 8 bytes");
  }
  if (count == 0) fail("an mbarrier of no arrivals");
  if (!s.phases.emplace(barrier, Phases{count, count}).second) fail("an mbarrier that is initialized again");
}

void mbarrier_arrive(void* barrier, unsigned bytes) {
  State& s = *g_state;
  Phases& phases = phases_of(barrier);
  if (phases.missing == 0) fail("mbarrier: more arrivals than a phase takes");
  --phases.missing;
  phases.bytes += bytes;
  advance(s, phases);
}

bool phase_is_over(const Phases& phases, unsigned parity) { return phases.complete % 2 != parity; }

void mbarrier_wait(const Site& site, void* barrier, unsigned parity) {
  State& s = *g_state;
  Phases& phases = phases_of(barrier);
  Fibre& me = *s.current;
  ++phases.waiting;
  perform_all(s, phases);
  me.site = site;
  me.phases = &phases;
  me.parity = parity;
  while (!phase_is_over(phases, parity)) {
    me.wait = Wait::kPhase;
    yield();
  }
  me.wait = Wait::kNone;
  --phases.waiting;
  me.acquired = std::max(me.acquired, phases.tick);
}

void copy_bulk(void* smem, const void* gmem, unsigned bytes, void* barrier) {
  State& s = *g_state;
  Phases& phases = phases_of(barrier);
  phases.copies.push_back(checked("copy_bulk", smem, gmem, bytes, bytes, 16));
  if (at_once(s) || phases.waiting != 0) perform_all(s, phases);
}

}  // namespace shim
