#include "parallel.hpp"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace bitforbit {
namespace {

const pid_t kLoadingProcess = getpid();

// Runs run(data) once on each of about `threads` threads of GNU OpenMP, the caller's among them.
using OpenMp = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP of a framework in this process, if there is one (PyTorch brings GNU's). Its idle threads spin for a
// while, so threads of our own would have to share the CPUs with them; and waking them is faster than starting ours.
OpenMp loaded_openmp() {
  static std::atomic<OpenMp> found{nullptr};
  if (getpid() != kLoadingProcess) return nullptr;  // GNU OpenMP does not survive a fork
  if (const OpenMp known = found.load()) return known;
  void* library = dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return nullptr;  // asked again next time: it may be loaded by then
  found = reinterpret_cast<OpenMp>(dlsym(library, "GOMP_parallel"));
  return found;
}

}  // namespace

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
  if (const OpenMp openmp = loaded_openmp()) {
    openmp([](void* data) { (*static_cast<decltype(work)*>(data))(); }, &work, static_cast<unsigned>(workers), 0);
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
