// The AVX-512 VBMI2 kernels with their two VBMI2 instructions emulated, for CPUs that have plain AVX-512 only.
#pragma once

#include "planes_block.hpp"

namespace bitforbit {
#if BITFORBIT_X86
extern const PlanesOps kPlanesAvx512Vbmi2Emulated;
#endif
}  // namespace bitforbit
