// Families `lanes` and `lanes_pairwise` with AVX-512 and FMA.
#include "generic/linear_lanes.hpp"

#include "isa/avx512/lanes.hpp"
#include "isa/avx512/vector.hpp"

namespace bitforbit {
const LinearOps kLanesAvx512 = lanes_ops<Avx512, Lanes512<Avx512, FmaSums512>>("avx512", true, true);
const LinearOps kPairwiseAvx512 =
    lanes_ops<Avx512, Pairwise<Lanes512<Avx512, FmaSums512>>>("avx512", true, false, "lanes_pairwise");
}  // namespace bitforbit
