// `planes` for AVX-512 with VBMI2.
#include "generic/planes.hpp"

#include "isa/avx512_vbmi2/vector.hpp"

namespace bitforbit {
const PlanesOps kPlanesAvx512Vbmi2{"avx512_vbmi2", decode_block<Avx512Vbmi2>, encode_block<Avx512Vbmi2>};
}
