// Whether F32 elements are widened BF16, that is, have zeros in their low 16 bits.
#include "portable.cuh"

// Rows are dealt to gridDim.y, columns to gridDim.x. Sets *found to 1 if an element has other bits there.
extern "C" __global__ void __launch_bounds__(256)
    planes_widened(const u32* data, u64 row_elements, u64 rows, u64 cols, u32* found) {
  u32 low = 0;
  for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
    const u32* const elements = data + row * row_elements;
#pragma unroll 4
    for (u64 col = static_cast<u64>(blockIdx.x) * 256 + threadIdx.x; col < cols; col += gridDim.x * 256) {
      low |= elements[col];
    }
  }
  if ((low & 0xFFFF) != 0) atomicOr(found, 1u);
}
