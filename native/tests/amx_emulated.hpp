// The AMX kernel with its tile instructions emulated, for CPUs without AMX (it needs AVX-512 VBMI2 all the same).
#pragma once

#include "linear_block.hpp"

namespace bitforbit {
#if BITFORBIT_X86
extern const LinearOps kTdpbf16AmxEmulated;
#endif
}  // namespace bitforbit
