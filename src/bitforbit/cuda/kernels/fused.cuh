// What the kernels for products share (cuda/fused/order.py: the order of summation; cuda/fused/linear.py: the table).
#pragma once
#include "mma.cuh"
#include "tiles.cuh"

constexpr u32 kMmaTokens = 8, kMmaCols = 16;  // of one mma: its weights are 16 rows by 16 columns

// A matrix of a launch, as the table has it: 64 bytes. Rows of the matrices before it tell where its output begins.
struct Matrix {
  const u8* gmem_tiles;
  const u8* gmem_escapes;
  u64 escapes_bytes;
  const u32* gmem_offsets;
  const u8* gmem_header;
  const void* gmem_bias;  // or nullptr
  u32 rows;
  u32 bias_type;  // of its elements: 0 BF16, 1 FP16, 2 FP32
  u64 rows_before;
};
static_assert(sizeof(Matrix) == 64, "entries of the table");

// The order of summation beyond the splits' number and size (cuda/fused/order.py: Order.rules).
struct Rules {
  u32 bits;

  // [1:0] how splits are added: ascending, descending, as a tree of neighbours, as one of halves
  __device__ __forceinline__ bool descending() const { return (bits & 3) == 1; }
  __device__ __forceinline__ bool tree() const { return (bits & 2) != 0; }
  __device__ __forceinline__ bool halves() const { return (bits & 3) == 3; }
  __device__ __forceinline__ bool rounds_partials() const { return (bits & 4) != 0; }  // [2] as outputs are
  __device__ __forceinline__ bool rounds_sums() const { return (bits & 8) != 0; }      // [3] after each addition, too
  __device__ __forceinline__ bool rounds_before_bias() const { return (bits & 16) != 0; }  // [4]
  __device__ __forceinline__ bool half_steps() const { return (bits & 32) != 0; }          // [5] 8 columns per mma
  __device__ __forceinline__ u32 longer() const { return bits >> 8; }  // [31:8] splits that have one tile more
};

// Activations, outputs and the operands of products: FP16 for weights of FP16, else BF16.
constexpr bool kF16 = BITFORBIT_WEIGHTS == 1;

__device__ __forceinline__ u16 to_output(float value) { return kF16 ? to_f16(value) : to_bf16(value); }
__device__ __forceinline__ float from_output(u16 word) { return kF16 ? from_f16(word) : from_bf16(word); }

// A step of 16 columns, or half of one.
__device__ __forceinline__ void multiply_whole(float (&sum)[4], uint4 a, u32 b0, u32 b1) {
  if constexpr (kF16) {
    mma_f16(sum, a, b0, b1);
  } else {
    mma_bf16(sum, a, b0, b1);
  }
}

__device__ __forceinline__ void multiply_half(float (&sum)[4], u32 a0, u32 a1, u32 b0) {
  if constexpr (kF16) {
    mma_f16_half(sum, a0, a1, b0);
  } else {
    mma_bf16_half(sum, a0, a1, b0);
  }
}

// First tile of a split; that of the split after the last is the number of tiles.
__device__ __forceinline__ u32 split_begin(u32 tiles_per_stripe, u32 split, u32 splits, u32 split_tiles, Rules rules) {
  const u64 whole = static_cast<u64>(split_tiles) * split + min(split, rules.longer());
  if (split_tiles != 0) return whole < tiles_per_stripe ? static_cast<u32>(whole) : tiles_per_stripe;
  return static_cast<u32>(static_cast<u64>(tiles_per_stripe) * split / splits);
}

__device__ __forceinline__ float rounded(float value, bool round) {
  return round ? from_output(to_output(value)) : value;
}

// Where the rules ask for a tree: adds this thread's sums of the splits up in place, into those of the first one.
// Returns how many splits' sums are left to be added.
__device__ __forceinline__ u32 add_trees(float4* gmem_unit, u32 block_sums, u32 threads, u32 splits, Rules rules) {
  if (!rules.tree()) return splits;
  for (u32 left = splits, apart = 1; left > 1;) {
    const u32 half = (left + 1) / 2;
    for (u32 i = 0; i < left / 2; ++i) {
      float4* gmem_to = gmem_unit + static_cast<u64>(rules.halves() ? i : 2 * apart * i) * block_sums;
      const float4* gmem_from = gmem_to + static_cast<u64>(rules.halves() ? half : apart) * block_sums;
#pragma unroll 1
      for (u32 at = 0; at < block_sums; at += threads) {
        const float4 a = __ldcg(gmem_to + at), b = __ldcg(gmem_from + at);
        const bool round = rules.rounds_sums();
        __stcg(gmem_to + at, make_float4(rounded(a.x + b.x, round), rounded(a.y + b.y, round),
                                         rounded(a.z + b.z, round), rounded(a.w + b.w, round)));
      }
    }
    left = half;
    apart *= 2;
  }
  return 1;
}

// What is added to a lane's two rows of a stripe; -0 where there is no bias, which changes no sum.
struct Bias {
  float of[2];
};

__device__ __forceinline__ Bias load_bias(const Matrix& matrix, u32 stripe, u32 lane) {
  Bias bias = {-0.0f, -0.0f};
#pragma unroll
  for (u32 i = 0; i < 2; ++i) {
    const u32 row = kTileRows * stripe + lane / 4 + 8 * i;
    if (matrix.gmem_bias == nullptr || row >= matrix.rows) continue;
    if (matrix.bias_type == 2) {
      bias.of[i] = __ldg(static_cast<const float*>(matrix.gmem_bias) + row);
    } else {
      const u16 word = __ldg(static_cast<const u16*>(matrix.gmem_bias) + row);
      bias.of[i] = matrix.bias_type == 1 ? from_f16(word) : from_bf16(word);
    }
  }
  return bias;
}

// Puts a stripe's sums for 8 tokens to gmem_out [tokens, rows], with the bias of their rows.
__device__ __forceinline__ void store_sums(const float (&sum)[4], const Bias& bias, u16* gmem_out, u32 stripe, u32 rows,
                                           u32 token, u32 tokens, u32 lane, Rules rules) {
#pragma unroll
  for (u32 e = 0; e < 4; ++e) {
    const u32 row = kTileRows * stripe + lane / 4 + 8 * (e / 2), at = token + 2 * (lane % 4) + e % 2;
    if (row >= rows || at >= tokens) continue;
    const float total = rounded(sum[e], rules.rounds_before_bias()) + bias.of[e / 2];
    gmem_out[static_cast<u64>(at) * rows + row] = to_output(total);
  }
}
