#include "parallel.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace bitforbit {
namespace {

std::atomic<ParallelRegion> region{nullptr};
std::atomic<pid_t> region_owner{0};

// GCC's OpenMP does not survive a fork: a child starts threads of its own.
ParallelRegion usable_region() {
  const ParallelRegion run = region;
  return run && region_owner == getpid() ? run : nullptr;
}

}  // namespace

void use_parallel_region(ParallelRegion replacement) {
  region_owner = getpid();
  region = replacement;
}

void parallel_for(std::size_t count, std::size_t grain, int threads, const std::function<void(std::size_t)>& body) {
  grain = std::max<std::size_t>(grain, 1);
  const std::size_t chunks = (count + grain - 1) / grain;
  const std::size_t workers = std::min<std::size_t>(chunks, static_cast<std::size_t>(std::max(threads, 1)));
  if (workers <= 1) {
    for (std::size_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  auto work = [&] {
    try {
      for (;;) {
        const std::size_t begin = next.fetch_add(grain);
        if (begin >= count) return;
        const std::size_t end = std::min(begin + grain, count);
        for (std::size_t i = begin; i < end; ++i) body(i);
      }
    } catch (...) {
      next.store(count);
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  };
  if (const ParallelRegion run = usable_region()) {
    run([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(workers), 0);
    if (error) std::rethrow_exception(error);
    return;
  }
  std::vector<std::thread> pool;
  pool.reserve(workers - 1);
  for (std::size_t i = 1; i < workers; ++i) {
    try {
      pool.emplace_back(work);
    } catch (const std::system_error&) {
      break;  // The system has no thread left: the ones that started do all the work.
    }
  }
  work();
  for (std::thread& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace bitforbit
