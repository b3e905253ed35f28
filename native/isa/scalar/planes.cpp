// `planes` for the baseline of the target: no instruction set beyond what every machine of it has.
#include "generic/planes.hpp"

#include "isa/scalar/vector.hpp"

namespace bitforbit {
const PlanesOps kPlanesScalar{"scalar", decode_block<Scalar>, encode_block<Scalar>};
}
