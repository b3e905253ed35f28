// Joins the partial results of kv_attend.cu: a row's segments in their order, then its other items. Which thread adds
// what depends on the number of a row's items alone. See kv.cuh for the macros.
#include "bf16x2.cuh"
#include "kv.cuh"
#include "mma.cuh"

constexpr u32 kThreads = 256, kWarps = kThreads / kWarp;
constexpr u32 kQueries = 8, kItemTiles = kSegmentTiles;
constexpr u32 kQuads = kHead / 4, kSlices = kThreads / kQuads;  // a slice has every kSlices-th item
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xFF800000); }

// Of all threads of a block; in the order of lanes' bits, then warps.
template <class F>
__device__ __forceinline__ float fold(float value, float* smem, F join) {
#pragma unroll
  for (int bits = 1; bits < static_cast<int>(kWarp); bits *= 2) {
    value = join(value, __shfl_xor_sync(kAllLanes, value, bits));
  }
  if (threadIdx.x % kWarp == 0) smem[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = smem[0];
  for (u32 w = 1; w < kWarps; ++w) value = join(value, smem[w]);
  return value;
}

// Block (query of the pass, row * heads + head). `gmem_sinks`: a logit for each head of the queries that joins the
// denominator. out [B, Hq, Lq, D], BF16 or FP32; lse [B, Hq, Lq] if it is not 0. Others are those of kv_attend.
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_merge(const i32* gmem_start, u32 heads, u32 residual, u32 sink, u32 slots, u32 visible, const i32* gmem_counter,
             u32 queries_per_head, u32 query_rows, u32 first_group, u32 groups, const float* gmem_sinks, u32 segments,
             const float* gmem_sums, const float* gmem_norms, void* gmem_out, u32 out_f32, float* gmem_lse) {
  SHARED(float, smem_largest, kWarps);
  SHARED(float, smem_weights, kWarps);
  SHARED(float4, smem_sums, kSlices * kQuads);
  const u32 row = blockIdx.y / heads, head = blockIdx.y % heads;
  const u32 group = blockIdx.x / kQueries, number = first_group * kQueries + blockIdx.x;
  if (number >= queries_per_head * query_rows) return;
  if (gmem_counter != nullptr) {
    visible = visible - slots + static_cast<u32>(*gmem_counter);
    slots = static_cast<u32>(*gmem_counter);
  }
  const u32 start = static_cast<u32>(gmem_start[row]), tokens = row_tokens(visible, start);
  const u32 values = values_quantized(row_tokens(slots, start), sink, residual);
  const u32 row_segments = (values + kSegmentTokens - 1) / kSegmentTokens;
  const u32 items = row_segments + rest_items(tokens, sink, values);

  // Of an item in the order in which they are joined: its query's place among partial results.
  const auto place = [&](u32 item) {
    const u32 at = item < row_segments ? item : segments + item - row_segments;
    return ((static_cast<u64>(at) * gridDim.y + blockIdx.y) * groups + group) * kQueries + blockIdx.x % kQueries;
  };
  const u32 query_head = head * queries_per_head + number / query_rows;
  float largest = gmem_sinks == nullptr ? minus_infinity() : gmem_sinks[query_head] * kLog2E;
  const float sink_exponent = largest;
  for (u32 i = threadIdx.x; i < items; i += kThreads) largest = fmaxf(largest, gmem_norms[2 * place(i)]);
  largest = fold(largest, smem_largest, [](float a, float b) { return fmaxf(a, b); });
  const float base = largest == minus_infinity() ? 0 : largest;
  float weights = threadIdx.x == 0 ? power_of_2(sink_exponent - base) : 0;
  for (u32 i = threadIdx.x; i < items; i += kThreads) {
    weights += power_of_2(gmem_norms[2 * place(i)] - base) * gmem_norms[2 * place(i) + 1];
  }
  weights = fold(weights, smem_weights, [](float a, float b) { return a + b; });

  const u32 slice = threadIdx.x / kQuads, quad = threadIdx.x % kQuads;
  float4 sum = make_float4(0, 0, 0, 0);
  if (slice < kSlices) {
#pragma unroll 4
    for (u32 i = slice; i < items; i += kSlices) {
      const float factor = power_of_2(gmem_norms[2 * place(i)] - base);
      const float4 part = __ldcg(reinterpret_cast<const float4*>(gmem_sums + place(i) * kHead) + quad);
      sum.x += factor * part.x, sum.y += factor * part.y, sum.z += factor * part.z, sum.w += factor * part.w;
    }
    smem_sums[threadIdx.x] = sum;
  }
  __syncthreads();
  const u64 query = (static_cast<u64>(row) * heads * queries_per_head + query_head) * query_rows + number % query_rows;
  if (gmem_lse != nullptr && threadIdx.x == 0) {
    gmem_lse[query] = weights == 0 ? minus_infinity() : base * kLn2 + logf(weights);
  }
  if (threadIdx.x >= kHead) return;
  float total = 0;
  for (u32 s = 0; s < kSlices; ++s) total += reinterpret_cast<const float*>(smem_sums)[s * kHead + threadIdx.x];
  total = weights == 0 ? 0 : total / weights;
  const u64 at = query * kHead + threadIdx.x;
  if (out_f32 != 0) {
    static_cast<float*>(gmem_out)[at] = total;
  } else {
    static_cast<u16*>(gmem_out)[at] = to_bf16(total);
  }
}
