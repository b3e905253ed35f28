// Families `lanes` and `lanes_pairwise` with AVX-512 and FMA.
#include "generic/linear_lanes.hpp"

#include "isa/avx512/lanes.hpp"
#include "isa/avx512/vector.hpp"

namespace bitforbit {
namespace {

struct Sums : FmaSums512 {
  static constexpr bool kBeside = false;  // expanding digits takes too many registers here
};

}  // namespace

const LinearOps kLanesAvx512 = lanes_ops<Avx512, Lanes512<Avx512, Sums>>("avx512", true, true);
const LinearOps kPairwiseAvx512 =
    lanes_ops<Avx512, Pairwise<Lanes512<Avx512, Sums>>>("avx512", true, false, "lanes_pairwise");
}  // namespace bitforbit
