// The state of the engine: of a block that runs on one OS thread.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "fibres.hpp"

namespace shim {

constexpr unsigned kMaxThreads = 1024;

enum class Wait { kNone, kBarrier, kCollective, kPhase, kProducts, kDone };

// A copy from global to shared memory that may not have been made yet.
struct Copy {
  char* to;
  const char* from;
  unsigned bytes, valid;  // the bytes behind the valid ones become zeros
  struct Fibre* by;
};

// An mbarrier.
struct Phases {
  unsigned count, missing;  // arrivals of a phase
  long long bytes = 0;      // announced and not there yet
  unsigned complete = 0;    // phases
  unsigned waiting = 0;     // threads
  unsigned tick = 0;        // for the race detector: of State, when the last phase ended
  std::vector<Copy> copies;
};

// A product of a warpgroup that may not have been made yet: of one lane.
struct Product {
  Site site;
  float* sum;
  unsigned tiles;             // of 8 columns
  const unsigned* registers;  // of a, which must stay
  uint64_t b;                 // its descriptor
  bool is_f16;                // a and b are, not BF16
  unsigned given[4]{};
  float a[2][16]{};  // this lane's rows
  bool made = false;
};

// Sums that products are under way to, which the kernel must not see.
struct PendingSums {
  float* at;
  std::vector<float> values;
  unsigned products;
};

struct Warpgroup {
  std::vector<uint64_t> descriptors;  // of its products, in their order
  unsigned issued[4]{};               // by its warps
};

struct Fibre {
  void* stack_top = nullptr;
  char* stack = nullptr;
  dim3 thread{};
  unsigned index = 0, lane = 0, warp = 0;
  Wait wait = Wait::kNone;
  Site site;
  Collective* joined = nullptr;
  std::vector<Copy> started;              // since the last commit
  std::vector<std::vector<Copy>> groups;  // committed
  std::vector<Product> products_started;  // since the last commit
  std::vector<std::vector<Product>> product_groups;
  std::vector<PendingSums> sums;
  unsigned products = 0;  // issued
  bool products_fenced = false;
  unsigned fences = 0;       // calls of fence_async
  Phases* phases = nullptr;  // waited for, until one of this parity is over
  unsigned parity = 0;
  unsigned acquired = 0;    // for the race detector: ticks up to which this thread knows what all others did
  unsigned seen[kLanes]{};  // for the race detector: time of the warp up to which this lane is in step with another
};

struct Warp {
  unsigned exited = 0;
  unsigned time = 1;  // counts __syncwarp
  Collective collectives[2 * kLanes];
};

// An array in shared memory of the block that runs, and what the race detector knows of its bytes.
struct Shared {
  const char* name;
  char* begin;
  size_t bytes;
  struct Cell* cells;
};

struct State {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  Fibre* current = nullptr;
  void* scheduler = nullptr;
  char* stacks = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  dim3 block{}, block_dim{}, grid_dim{};
  unsigned threads = 0, running = 0, at_barrier = 0, seed = 0, round = 0;
  unsigned barriers = 1;    // passed by the block, plus one
  uint64_t generation = 0;  // of the block: shared arrays are made anew for each
  size_t dynamic_bytes = 0;
  unsigned ticks = 0;  // counts the phases of mbarriers that ended
  std::map<const void*, Phases> phases;
  std::vector<Warpgroup> warpgroups;
  std::vector<Shared> shared;
  std::string fault;
  void (*entry)(void**) = nullptr;
  void** arguments = nullptr;
};

extern constinit thread_local State* g_state;

// What the race detector, where it is linked (races.cpp), does.
struct RaceHooks {
  struct Cell* (*track)(size_t bytes) = nullptr;
  void (*forget)(struct Cell*) = nullptr;
  void (*access)(const void* address, size_t bytes, bool write) = nullptr;
  void (*access_by_proxy)(const void* address, size_t bytes) = nullptr;  // a read by a tensor core
};
extern RaceHooks g_races;

// Whether a read of shared memory that no thread has written is a fault. Kernels may read such bytes and drop them.
extern bool g_report_uninitialized;

[[noreturn]] void fail(const std::string& message);

// Runs all fibres of g_state's block to their end, or until one of them fails.
void run_block();

bool phase_is_over(const Phases& phases, unsigned parity);

// Whether all warps of a thread's warpgroup have issued the products that it has.
bool products_are_issued(const State& s, const Fibre& f);

// i-th of n in an order that depends on the seed and the round; seed 0: ascending, seed 1: descending.
unsigned permuted(unsigned i, unsigned n, unsigned seed, unsigned round);

// Bytes of stack of one fibre.
size_t stack_bytes();

}  // namespace shim
