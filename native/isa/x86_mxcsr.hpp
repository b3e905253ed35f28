// SSE's control register: denormals as zeros, in and out.
#pragma once

#include <immintrin.h>

namespace bitforbit {
namespace {

// FTZ and DAZ within a scope.
class FlushDenormals {
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  unsigned before_;
};

// Denormals count again, inside the lifetime of a FlushDenormals.
class KeepDenormals {
 public:
  KeepDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(before_); }
  KeepDenormals(const KeepDenormals&) = delete;

 private:
  unsigned before_;
};

}  // namespace
}  // namespace bitforbit
