// Attention of FP32 matrices with tiles sized for a cache: packing, threads, choice of the instruction set.
#pragma once

#include <string_view>

#include "tiled_attention_block.hpp"

namespace bitforbit {

struct TiledAttentionArguments {
  const float *q, *k, *v;                      // [heads, queries, channels], [heads, keys, channels] twice
  float* out;                                  // as q
  std::size_t heads, queries, keys, channels;  // all at least 1
  float scaling;
  bool square;       // which order of loops
  std::size_t rows;  // queries of a tile, rounded up to a multiple of kTiledGroup
  int threads;
};

// The best kernels at instruction set level `isa` (or below) that this CPU runs.
const TiledAttentionOps& find_tiled_attention(std::string_view isa);

// out = softmax(scaling * q k^T) v. The same bits for any number of threads.
void tiled_attention(const TiledAttentionArguments& a, const TiledAttentionOps& ops);

}  // namespace bitforbit
