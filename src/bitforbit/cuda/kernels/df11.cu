// DFloat11 to BF16: a range of weights of a unit, or rows of a matrix by their ids.
#include "df11.cuh"

// Weights [begin, end), which lie in the blocks [first_block, end_block), to out. status: address of a u32, or 0.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    df11_decode(const u8* tables, const u32* stream, const u8* sign_mantissa, const u32* gaps, const u32* positions,
                u32 blocks, u32 elements, u32 stream_words, u32 rows, u32 shortest, u32 slot_words, u32 block_symbols,
                u32 first_block, u32 end_block, u32 begin, u32 end, u16* out, u32* status) {
  DYNAMIC_SHARED(u8, smem);
  const Unit unit{tables,   stream,       sign_mantissa, gaps,     positions,  blocks,
                  elements, stream_words, rows,          shortest, slot_words, block_symbols};
  u32 block = first_block + blockIdx.x;
  Window next = load_window(unit, block);
  const Shared shared = load_tables(unit, smem);
  while (block < end_block) {
    const Window window = next;
    block += gridDim.x;
    if (block < end_block) next = load_window(unit, block);
    decode_block(unit, shared, window, begin, end, out, status);
  }
}

// The last block that begins at a weight or before it, found by every warp for itself, 32 ways at a time.
__device__ __forceinline__ u32 block_of(const Unit& unit, u32 weight) {
  const u32 lane = threadIdx.x % kWarp;
  u32 begin = 0, size = unit.blocks;
  while (size > 1) {
    const u32 step = (size + kWarp - 1) / kWarp;
    const u32 at = lane * step;
    const u32 before = __ballot_sync(kAllLanes, at < size && unit.positions[begin + at] <= weight);
    const u32 skipped = (before == 0 ? 0 : u32(__popc(before)) - 1) * step;
    begin += skipped;
    size = min(size - skipped, step);
  }
  return begin;
}

// Rows ids[0 .. count) of the matrix of `matrix_rows` rows that begins at weight `first`, each of `cols` weights, to
// out [count, cols]. An id outside the matrix gives zeros.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    df11_rows(const u8* tables, const u32* stream, const u8* sign_mantissa, const u32* gaps, const u32* positions,
              u32 blocks, u32 elements, u32 stream_words, u32 rows, u32 shortest, u32 slot_words, u32 block_symbols,
              u32 first, u32 cols, u32 matrix_rows, const u8* ids, u32 id_bytes, u64 count, u16* out, u32* status) {
  DYNAMIC_SHARED(u8, smem);
  const Unit unit{tables,   stream,       sign_mantissa, gaps,     positions,  blocks,
                  elements, stream_words, rows,          shortest, slot_words, block_symbols};
  const Shared shared = load_tables(unit, smem);
  for (u64 k = blockIdx.x; k < count; k += gridDim.x) {
    const i64 id = id_bytes == 8 ? reinterpret_cast<const i64*>(ids)[k] : reinterpret_cast<const i32*>(ids)[k];
    u16* gmem_row = out + k * cols;
    if (id < 0 || id >= matrix_rows) {
      for (u32 i = threadIdx.x; i < cols; i += kThreads) gmem_row[i] = 0;
      if (status != nullptr && threadIdx.x == 0) atomicOr(status, kStatusIndex);
      continue;
    }
    const u32 begin = first + static_cast<u32>(id) * cols, end = begin + cols;
    for (u32 block = block_of(unit, begin); block < unit.blocks; ++block) {
      const Window window = load_window(unit, block);
      decode_block(unit, shared, window, begin, end, gmem_row, status);
      if (window.positions[1] >= end) break;
    }
  }
}
