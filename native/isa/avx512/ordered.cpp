// Families `vdpbf16` and `vdpbf16_emulated` with AVX-512 as in Skylake-X.
#include "generic/planes.hpp"
#include "isa/avx512/ordered_fma.hpp"
#include "isa/avx512/vector.hpp"

namespace bitforbit {
const LinearOps kVdpbf16Avx512 =
    ordered_ops<FmaAvx512<true>>("vdpbf16", "avx512", true, multiply_decoded<Avx512, FmaAvx512<true>>);
const LinearOps kEmulatedAvx512 =
    ordered_ops<FmaAvx512<false>>("vdpbf16_emulated", "avx512", false, multiply_decoded<Avx512, FmaAvx512<false>>);
}  // namespace bitforbit
