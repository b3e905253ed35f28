// Tiled attention: four lanes, which compilers map to the target's least vectors.
#include "generic/tiled_attention.hpp"

namespace bitforbit {
const TiledAttentionOps kTiledAttentionScalar = tiled_attention_ops<4, 2>("scalar");
}  // namespace bitforbit
