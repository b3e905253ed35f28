// `planes` for AVX2 (x86-64-v3).
#include "generic/planes.hpp"

#include "isa/avx2/vector.hpp"

namespace bitforbit {
const PlanesOps kPlanesAvx2{"avx2", decode_block<Avx2>, encode_block<Avx2>};
}
