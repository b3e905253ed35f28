// `planes` for the baseline of the target: no instruction set beyond what every machine of it has.
#include "isa/scalar/vector.hpp"

#include "generic/planes.hpp"

namespace bitforbit {
const PlanesOps kPlanesScalar{"scalar", decode_block<Scalar>, encode_block<Scalar>};
}
