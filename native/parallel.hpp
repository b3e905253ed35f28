// Work spread over threads by index.
#pragma once

#include <cstddef>
#include <functional>

namespace bitforbit {

// Calls body(index) once for every index in [0, count), on at most `threads` threads (the caller's among them).
// Indices are handed out in order, `grain` at a time. The first exception thrown by a body is rethrown here once
// all threads have stopped.
void parallel_for(std::size_t count, std::size_t grain, int threads, const std::function<void(std::size_t)>& body);

}  // namespace bitforbit
