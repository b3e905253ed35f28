// `planes` for AVX-512 as in Skylake-X: F, BW, DQ, VL, without byte compress and expand.
#include "generic/planes.hpp"

#include "isa/avx512/vector.hpp"

namespace bitforbit {
const PlanesOps kPlanesAvx512{"avx512", decode_block<Avx512>, encode_block<Avx512>};
}
