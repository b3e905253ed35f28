// Tiled attention: 8 of 16 registers hold sums.
#include "generic/tiled_attention.hpp"

namespace bitforbit {
const TiledAttentionOps kTiledAttentionAvx2 = tiled_attention_ops<8, 2>("avx2");
}  // namespace bitforbit
