// The contract between the driver of fused products (linear.cpp) and the families of summation orders
// (isa/*/linear_*.cpp and isa/*/ordered_*.cpp). Plain pointers and C structs, for the reason given in planes_block.hpp.
//
// A family is one order of summation; its implementations give the same bits on every instruction set. Outline of a
// product of `tokens` rows of activations with a BF16 matrix: the driver packs the activations once (pack), then hands
// runs of 16-row blocks to `multiply` on several threads, each with scratch of its own, adds the bias and rounds.
#pragma once

#include "planes_block.hpp"

namespace bitforbit {

inline constexpr std::size_t kMostBlocksAtOnce = 4;

// Activations as the caller holds them, row-major.
struct LinearInput {
  const std::uint8_t* x;  // [tokens, cols] of BF16, or of F32
  bool f32;
  std::size_t tokens, cols;
};

// What the kernels of one product share.
struct LinearProduct {
  std::size_t cols, tokens;
  std::size_t k_block;    // columns per partial sum that starts at +0; 0: all of them
  bool f32;               // the activations were F32
  const std::uint8_t* x;  // as packed by `pack`, on a 64-byte boundary
  float* sums;            // [tokens, sums_stride]: row r of the first block at r, of the next one at 16 + r
  std::size_t sums_stride;
  std::uint8_t* scratch;  // scratch_bytes(tokens, cols), on a 64-byte boundary, this thread's own; holds anything
};

// One family on one instruction set. Every function is called with the caller's rounding mode reset to nearest even
// and denormals kept; one that changes MXCSR restores it.
struct LinearOps {
  const char* family;
  const char* isa;     // the level (dispatch.hpp) from which on this is used; of several the last one in the list is
  bool (*usable)();    // what the CPU needs beyond that level, or nullptr
  bool bf16, f32;      // which activations it takes
  bool vcvtneps2bf16;  // sums become BF16 as by that instruction: denormals are zeros, NaNs keep their upper bits
  std::size_t blocks_at_once;  // most blocks per call of `multiply`: 1 to kMostBlocksAtOnce
  std::size_t (*packed_bytes)(std::size_t tokens, std::size_t cols, bool f32);
  void (*pack)(const LinearInput& input, std::uint8_t* packed);
  std::size_t (*scratch_bytes)(std::size_t tokens, std::size_t cols);
  // Blocks of one matrix, kind BF16, not wide, with scratch for their tails and without `out`; all but the last one
  // of the matrix have 16 rows. Writes block.rows sums per token and block. False: a tail contradicts its digits.
  // Whatever the parts hold, it reads and writes only what DecodeBlock and LinearProduct allow.
  bool (*multiply)(const LinearProduct& p, const DecodeBlock* blocks, std::size_t count);
  // The same product in the same order from plain BF16, [rows, cols]: at most 16 * blocks_at_once rows.
  void (*multiply_dense)(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows);
};

extern const LinearOps kLanesScalar;
extern const LinearOps kPairwiseScalar;
extern const LinearOps kVdpbf16Scalar;
extern const LinearOps kEmulatedScalar;
extern const LinearOps kTdpbf16Scalar;
#if BITFORBIT_X86
extern const LinearOps kLanesAvx2;
extern const LinearOps kLanesAvx512;
extern const LinearOps kLanesAvx512Vbmi2;
extern const LinearOps kLanesAvx512Bf16;
extern const LinearOps kPairwiseAvx512;
extern const LinearOps kPairwiseAvx512Vbmi2;
extern const LinearOps kVdpbf16Avx2;
extern const LinearOps kVdpbf16Avx512;
extern const LinearOps kVdpbf16Avx512Bf16;
extern const LinearOps kEmulatedAvx2;
extern const LinearOps kEmulatedAvx512;
extern const LinearOps kEmulatedAvx512Vbmi2;
extern const LinearOps kTdpbf16Amx;
#endif

}  // namespace bitforbit
