// Work spread over threads by index.
#pragma once

#include <cstddef>
#include <functional>

namespace bitforbit {

// Calls body(index) once for every index in [0, count), on at most `threads` threads (the caller's among them).
// Indices are handed out in order, `grain` at a time. The first exception thrown by a body is rethrown here once
// all threads have stopped.
void parallel_for(std::size_t count, std::size_t grain, int threads, const std::function<void(std::size_t)>& body);

// Runs fn(data) on up to `threads` threads, the caller's among them, and returns when all have: GOMP_parallel, which
// the OpenMP runtimes of GCC, LLVM and Intel export.
using ParallelRegion = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

// From now on parallel_for takes its threads from there (nullptr: from threads of its own). A host with an OpenMP pool
// lets its idle threads spin; a second pool would fight them for the cores.
void use_parallel_region(ParallelRegion region);

}  // namespace bitforbit
