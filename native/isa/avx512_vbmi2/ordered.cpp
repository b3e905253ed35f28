// Family `vdpbf16_emulated` with AVX-512 VBMI2 and FMA (Ice Lake).
#include "isa/avx512/ordered_fma.hpp"
#include "isa/avx512_vbmi2/ordered_tiles.hpp"

namespace bitforbit {
const LinearOps kEmulatedAvx512Vbmi2 =
    ordered_ops<FmaAvx512<false>>("vdpbf16_emulated", "avx512_vbmi2", false, ordered_multiply<FmaAvx512<false>>);
}  // namespace bitforbit
