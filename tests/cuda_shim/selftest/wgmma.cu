// sum [64, TOKENS] += a [64, 64] x [TOKENS, 64]^T by a warpgroup: four products, one after the other. Macros plant
// faults: PROXY and FENCE, whether fence_async and wgmma_fence are called; WAIT, groups that may be under way when the
// sums are read; TOUCH, whether a register of a changes before the wait; ODD, whether the last warp has another b.
#include "wgmma.cuh"

#ifndef PROXY
#define PROXY 1
#endif
#ifndef FENCE
#define FENCE 1
#endif
#ifndef WAIT
#define WAIT 0
#endif
#ifndef TOUCH
#define TOUCH 0
#endif
#ifndef ODD
#define ODD 0
#endif

extern "C" __global__ void __launch_bounds__(128) multiply(const u16* a, const u16* x, float* sums) {
  DYNAMIC_SHARED(u8, smem_all);
  u8* smem = smem_all + (0u - shared_address(smem_all)) % kSwizzleBytes;
  const u32 lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * 16 + lane / 4;
  for (u32 i = threadIdx.x; i < TOKENS * 8; i += 128) {
    *reinterpret_cast<uint4*>(smem + swizzled(i / 8, i % 8)) = reinterpret_cast<const uint4*>(x)[i];
  }
  if (PROXY) fence_async();
  __syncthreads();
  uint4 fragment[4];
  for (u32 i = 0; i < 4; ++i) {
    const auto pair = [&](u32 r) {
      return *reinterpret_cast<const u32*>(a + (row + 8 * (r % 2)) * 64 + 16 * i + 2 * (lane % 4) + 8 * (r / 2));
    };
    fragment[i] = make_uint4(pair(0), pair(1), pair(2), pair(3));
  }
  float sum[TOKENS / 8][4];
  float* gmem[2] = {sums + row * TOKENS + 2 * (lane % 4), sums + (row + 8) * TOKENS + 2 * (lane % 4)};
  for (u32 e = 0; e < TOKENS / 2; ++e) sum[e / 4][e % 4] = gmem[e % 4 / 2][e / 4 * 8 + e % 2];
  const u64 b = wgmma_descriptor(shared_address(smem)) + (ODD && threadIdx.x >= 96 ? kDescriptorStep : 0);
  if (FENCE) wgmma_fence();
  for (u32 i = 0; i < 4; ++i) wgmma_bf16(sum, fragment[i], b + i * kDescriptorStep);
  wgmma_commit();
  if (TOUCH) fragment[3].w = 0;
  wgmma_wait<WAIT>();
  wgmma_settle(sum);
  for (u32 e = 0; e < TOKENS / 2; ++e) gmem[e % 4 / 2][e / 4 * 8 + e % 2] = sum[e / 4][e % 4];
}
