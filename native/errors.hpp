// Errors of the native library.
#pragma once

#include <stdexcept>

namespace bitforbit {

// Coded data whose tables, counts or codes contradict each other: bitforbit.errors.CorruptTensorError in Python.
struct CorruptData : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace bitforbit
