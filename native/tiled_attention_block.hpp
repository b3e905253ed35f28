// The contract between the driver of tiled attention (tiled_attention.cpp) and its kernels (isa/*/tiled_attention.cpp).
// Plain pointers and C structs, for the reason given in planes_block.hpp.
//
// Everything is FP32 and packed by the driver so that what a kernel has in the L1 cache at a time is contiguous:
// keys in blocks of kTiledWidth, channels of a product in steps of kTiledDepth, queries in groups of kTiledGroup.
#pragma once

#include <cstddef>

namespace bitforbit {

inline constexpr std::size_t kTiledWidth = 64;  // keys of a tile of scores, and channels of a tile of the output
inline constexpr std::size_t kTiledDepth = 16;  // terms of a sum that are added between a tile's load and its store
inline constexpr std::size_t kTiledGroup = 4;   // queries that a kernel holds in registers

// `rows` queries of one head against all its keys.
struct TiledAttentionBlock {
  std::size_t rows;           // a multiple of kTiledGroup; queries beyond the last one are zeros
  std::size_t keys;           // those of the head
  std::size_t steps;          // channels / kTiledDepth, rounded up (zeros there)
  std::size_t strips;         // channels / kTiledWidth, rounded up (zeros there)
  const float* queries;       // [steps][rows / kTiledGroup][kTiledDepth][kTiledGroup]
  float scaling;              // of scores
  const float* key_blocks;    // [keys / kTiledWidth, up][steps * kTiledDepth][kTiledWidth], zeros beyond the last key
  const float* value_strips;  // [strips][keys][kTiledWidth]
  float* scores;              // flash: [rows][kTiledWidth]; square: [keys / kTiledWidth, up][rows][kTiledWidth]
  float* out;                 // [strips][rows][kTiledWidth]
  float* maxima;              // [rows]
  float* sums;                // [rows]
};

// One instruction set's kernels.
struct TiledAttentionOps {
  const char* isa;
  void (*flash)(const TiledAttentionBlock& block);   // FlashAttention-2's order of loops
  void (*square)(const TiledAttentionBlock& block);  // two phases: all scores of the block, then tiles of the output
};

extern const TiledAttentionOps kTiledAttentionScalar;
#if BITFORBIT_X86
extern const TiledAttentionOps kTiledAttentionAvx2;
extern const TiledAttentionOps kTiledAttentionAvx512;
#endif

}  // namespace bitforbit
