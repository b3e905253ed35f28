// How a launch comes from Python: the kernels of a text by name, their arguments, the blocks one after the other.
#include "launch.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <system_error>
#include <thread>

#include "state.hpp"

namespace shim {
namespace {

struct KernelEntry {
  const char* name;
  void (*call)(void**);
  std::vector<size_t> parameter_bytes;
  unsigned max_threads;
};
std::vector<KernelEntry>& kernels() {
  static std::vector<KernelEntry> all;
  return all;
}

const KernelEntry* find(const char* name) {
  for (const KernelEntry& k : kernels()) {
    if (std::strcmp(k.name, name) == 0) return &k;
  }
  return nullptr;
}

std::string invalid(const KernelEntry& kernel, dim3 grid, dim3 block) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return "a launch of nothing";
  if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) return "grid too large";
  if (threads > kMaxThreads || block.z > 64) return "block too large";
  if (threads > kernel.max_threads) {
    return "block of " + std::to_string(threads) + " threads, but __launch_bounds__ " +
           std::to_string(kernel.max_threads);
  }
  return "";
}

void run_blocks(State& s, std::atomic<uint64_t>& next) {
  const uint64_t blocks = uint64_t{s.grid_dim.x} * s.grid_dim.y * s.grid_dim.z;
  const size_t below = 16 * stack_bytes();  // room for an overflow to land in, so that it can be told
  const size_t bytes = below + s.threads * stack_bytes();
  void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) {
    s.fault = std::string("no memory for stacks: ") + std::strerror(errno);
    return;
  }
  s.stacks = static_cast<char*>(stacks) + below;
  g_state = &s;
  for (uint64_t i; s.fault.empty() && (i = next++) < blocks;) {
    const uint64_t b = blocks > 0xFFFFFFFF ? i : permuted(unsigned(i), unsigned(blocks), s.seed, 0);
    s.block = {unsigned(b % s.grid_dim.x), unsigned(b / s.grid_dim.x % s.grid_dim.y),
               unsigned(b / (uint64_t{s.grid_dim.x} * s.grid_dim.y))};
    run_block();
    for (const Shared& shared : s.shared) {
      std::free(shared.begin);
      if (shared.cells != nullptr) g_races.forget(shared.cells);
    }
    s.shared.clear();
  }
  if (!s.fault.empty()) next = blocks;
  g_state = nullptr;
  munmap(stacks, bytes);
}

std::string launch(const KernelEntry& kernel, dim3 grid, dim3 block, size_t dynamic_bytes, void** arguments,
                   unsigned seed, unsigned os_threads) {
  const std::string wrong = invalid(kernel, grid, block);
  if (!wrong.empty()) return wrong;
  std::atomic<uint64_t> next{0};
  std::vector<State> states(std::max(1u, os_threads));
  for (State& s : states) {
    s.dynamic_bytes = dynamic_bytes;
    s.grid_dim = grid;
    s.block_dim = block;
    s.threads = block.x * block.y * block.z;
    s.fibres.resize(s.threads);
    s.warps.resize((s.threads + kLanes - 1) / kLanes);
    s.seed = seed;
    s.entry = kernel.call;
    s.arguments = arguments;
  }
  std::vector<std::thread> pool;
  try {
    for (size_t w = 1; w < states.size(); ++w) pool.emplace_back(run_blocks, std::ref(states[w]), std::ref(next));
  } catch (const std::system_error&) {
    // Fewer threads do the work as well.
  }
  run_blocks(states[0], next);
  for (std::thread& t : pool) t.join();
  for (const State& s : states) {
    if (!s.fault.empty()) return s.fault;
  }
  return "";
}

}  // namespace

Register::Register(const char* name, void (*call)(void**), const size_t* bytes, size_t parameters,
                   unsigned max_threads) {
  kernels().push_back({name, call, {bytes, bytes + parameters}, max_threads});
}

}  // namespace shim

// In place of the sanitizer's runtime, which would print and go on: where -fsanitize=alignment is on without it.
#ifdef SHIM_CHECK_ALIGNMENT
extern "C" {
struct ShimTypeMismatch {
  const char* file;
  unsigned line, column;
  const void* type;
  unsigned char log_alignment;
};
__attribute__((used)) void __ubsan_handle_type_mismatch_v1(const ShimTypeMismatch* data, uintptr_t address) {
  const unsigned alignment = 1u << data->log_alignment;
  shim::fail(std::string("misaligned access, ") + data->file + ":" + std::to_string(data->line) + ": address " +
             std::to_string(address % 256) + " modulo 256, alignment " + std::to_string(alignment));
}
}
#endif

extern "C" {
void shim_report_uninitialized(bool on) { shim::g_report_uninitialized = on; }
void shim_mma_rounds_each(bool on) { shim::g_mma_rounds_each = on; }
int shim_parameters(const char* name, size_t* bytes) {
  const shim::KernelEntry* kernel = shim::find(name);
  if (kernel == nullptr || kernel->parameter_bytes.size() > 64) return -1;
  std::copy(kernel->parameter_bytes.begin(), kernel->parameter_bytes.end(), bytes);
  return static_cast<int>(kernel->parameter_bytes.size());
}

int shim_launch(const char* name, const unsigned* grid, const unsigned* block, size_t dynamic_bytes, void** arguments,
                unsigned seed, unsigned os_threads, char* message, size_t message_bytes) {
  const shim::KernelEntry* kernel = shim::find(name);
  const std::string fault = kernel == nullptr
                                ? std::string("no such kernel")
                                : shim::launch(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                                               dynamic_bytes, arguments, seed, os_threads);
  std::snprintf(message, message_bytes, "%s", fault.c_str());
  return fault.empty() ? 0 : 1;
}
}
