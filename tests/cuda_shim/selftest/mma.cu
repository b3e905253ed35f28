// d [16, 8] += a [16, 16] b [16, 8]: fragments gathered by hand, and by ldmatrix.
#include "ldmatrix.cuh"
#include "mma.cuh"

extern "C" __global__ void __launch_bounds__(32) multiply(const u16* a, const u16* b, float* d, u32 by_ldmatrix) {
  SHARED(u16, smem_a, 256);
  const u32 lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (u32 i = lane; i < 256; i += kWarp) smem_a[i] = a[i];
  __syncwarp();
  u32 fragment_a[4], fragment_b[2];
  float sums[4];
  if (by_ldmatrix) {
    // Matrix k: rows 8 * (k % 2) on, columns 8 * (k / 2) on.
    const uint4 words = ldmatrix_x4(smem_a + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    fragment_a[0] = words.x, fragment_a[1] = words.y, fragment_a[2] = words.z, fragment_a[3] = words.w;
  } else {
    for (u32 r = 0; r < 4; ++r) {
      const u32 at = (g + 8 * (r % 2)) * 16 + 2 * t + 8 * (r / 2);
      fragment_a[r] = smem_a[at] | u32(smem_a[at + 1]) << 16;
    }
  }
  for (u32 r = 0; r < 2; ++r) fragment_b[r] = b[(2 * t + 8 * r) * 8 + g] | u32(b[(2 * t + 8 * r + 1) * 8 + g]) << 16;
  for (u32 r = 0; r < 4; ++r) sums[r] = d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2];
  mma_bf16(sums, make_uint4(fragment_a[0], fragment_a[1], fragment_a[2], fragment_a[3]), fragment_b[0], fragment_b[1]);
  for (u32 r = 0; r < 4; ++r) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sums[r];
}
