// Families `lanes` and `lanes_pairwise` with AVX-512 VBMI2 and FMA.
#include "generic/linear_lanes.hpp"

#include "isa/avx512/lanes.hpp"
#include "isa/avx512_vbmi2/vector.hpp"

namespace bitforbit {
const LinearOps kLanesAvx512Vbmi2 =
    lanes_ops<Avx512Vbmi2, Lanes512<Avx512Vbmi2, FmaSums512>>("avx512_vbmi2", true, true);
const LinearOps kPairwiseAvx512Vbmi2 =
    lanes_ops<Avx512Vbmi2, Pairwise<Lanes512<Avx512Vbmi2, FmaSums512>>>("avx512_vbmi2", true, false, "lanes_pairwise");
}  // namespace bitforbit
