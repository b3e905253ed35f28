// The products of AVX-512 VBMI2 and BF16 with the instructions beyond plain AVX-512 emulated.
#pragma once

#include "linear_block.hpp"

namespace bitforbit {
#if BITFORBIT_X86
extern const LinearOps kLanesAvx512Vbmi2Emulated;
extern const LinearOps kLanesAvx512Bf16Emulated;
extern const LinearOps kPairwiseAvx512Vbmi2Emulated;
#endif
}  // namespace bitforbit
