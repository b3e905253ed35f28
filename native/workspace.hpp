// What the drivers of kernels give to every thread: a known state of the FPU, and memory that stays.
#pragma once

#include <algorithm>
#include <cstring>

#if BITFORBIT_X86
#include <xmmintrin.h>
#endif

#include "planes.hpp"

namespace bitforbit {

// Rounding to nearest, denormals kept, no traps, whatever this thread had; put back at the end.
class DefaultFloats {
#if BITFORBIT_X86
 public:
  DefaultFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloats() { _mm_setcsr(before_); }
  DefaultFloats(const DefaultFloats&) = delete;

 private:
  unsigned before_;
#endif
};

// Bytes that stay with the thread; zeroed when they are new.
class Workspace {
 public:
  std::uint8_t* reserve(std::size_t size) {
    if (buffer_.size() < size) {
      buffer_ = Buffer();  // first free, then allocate
      buffer_ = Buffer(std::max(size, std::min(2 * size, kKeptBytes)));
      std::memset(buffer_.data(), 0, buffer_.size());
    }
    return buffer_.data();
  }
  void release() {
    if (buffer_.size() > kKeptBytes) buffer_ = Buffer();
  }

 private:
  static constexpr std::size_t kKeptBytes = 8 << 20;  // that a thread keeps between calls
  Buffer buffer_;
};

}  // namespace bitforbit
