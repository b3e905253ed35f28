// Tiled attention: 16 of 32 registers hold sums.
#include "generic/tiled_attention.hpp"

namespace bitforbit {
const TiledAttentionOps kTiledAttentionAvx512 = tiled_attention_ops<16, 4>("avx512");
}  // namespace bitforbit
