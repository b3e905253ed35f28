// The tile layout (cuda/tiles/layout.py says where every bit lies): a lane's share of a tile, from memory to weights.
#pragma once
#include "portable.cuh"

constexpr u32 kTileRows = 16, kTileCols = 64, kTileWeights = 1024;
constexpr u32 kPairs = 16;  // of a lane: two weights in a register, in the order of the matrix instruction

constexpr u32 kHeaderBase = 64, kHeaderEntryBytes = 68;
constexpr u32 kWideBytes = 4;  // of an entry; narrow ones have 2

#ifdef BITFORBIT_CUDA_SHIM

template <u32 kFactor>
u32 multiply_add(u32 value, u32 addend) {
  return value * kFactor + addend;
}

#else

// One instruction; written as above, it becomes a shift, a mask and an addition.
template <u32 kFactor>
__device__ __forceinline__ u32 multiply_add(u32 value, u32 addend) {
  u32 sum;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(value), "n"(kFactor), "r"(addend));
  return sum;
}

#endif

// The kind of weights: BITFORBIT_WEIGHTS is 0 (BF16), 1 (FP16) or 2 (FP8 E4M3).
#ifndef BITFORBIT_WEIGHTS
#define BITFORBIT_WEIGHTS 0
#endif
#include "weights_bf16.cuh"
#include "weights_f16.cuh"
#include "weights_f8.cuh"

// Loads for read_lane: of tiles in device memory, and of those in shared memory.
struct Streamed {
  template <class T>
  __device__ __forceinline__ T operator()(const T* gmem) const {
    return load_once(gmem);
  }
};

struct Resident {
  template <class T>
  __device__ __forceinline__ T operator()(const T* smem) const {
    return *smem;
  }
};

// Lane `number`'s share of a tile.
__device__ __forceinline__ void load_lane(const u8* gmem_tile, u32 number, Lane& lane) {
  read_lane(gmem_tile + 16 * number, gmem_tile + kTileCodes + kLaneCodeBytes * number, Streamed{}, lane);
}

// Where a tile's weights lie in shared memory, as half-word indices. A lane's four registers of a step stay side by
// side (16 bytes); lanes l and l ^ i change places at step i, so that the eight rows of an ldmatrix, two lanes at four
// steps, lie in different banks.
__device__ __forceinline__ u32 staged(u32 position) { return position ^ (position >> 5 & 0x18); }

// Writes a lane's weights of a tile to shared memory.
__device__ __forceinline__ void stage(const u32 (&pair)[kPairs], u16* smem_tile, u32 lane) {
#pragma unroll
  for (u32 i = 0; i < 4; ++i) {
    *reinterpret_cast<uint4*>(smem_tile + 256 * i + (8 * lane ^ 8 * i)) =
        make_uint4(pair[4 * i], pair[4 * i + 1], pair[4 * i + 2], pair[4 * i + 3]);
  }
}

struct Header {
  u32 base;   // as decode_lane takes it
  u32 wide;   // entries are 4 bytes
  u32 table;  // lane l: exponents 4 * (l mod 16) to + 3 of the table
};

__device__ __forceinline__ Header load_header(const u8* gmem_header, u32 lane) {
  const u32* words = reinterpret_cast<const u32*>(gmem_header);
  return {base_word(__ldg(words + kHeaderBase / 4) & 0xFF),
          __ldg(words + kHeaderEntryBytes / 4) == kWideBytes ? 1u : 0u, __ldg(words + lane % 16)};
}

// Number of whole entries that the part `escapes` has room for.
__device__ __forceinline__ u32 entry_capacity(u64 escapes_bytes, u32 wide) {
  const u64 entries = escapes_bytes >> (1 + wide);
  return entries < 0xFFFFFFFFu ? static_cast<u32>(entries) : 0xFFFFFFFFu;
}

// Entry of an index below the capacity.
__device__ __forceinline__ u32 load_entry(const u8* gmem_escapes, u32 index, u32 wide) {
  return wide ? __ldg(reinterpret_cast<const u32*>(gmem_escapes) + index)
              : __ldg(reinterpret_cast<const u16*>(gmem_escapes) + index);
}

// Exponent of an entry. Called by all lanes of a warp, since they hold the table together.
__device__ __forceinline__ u32 entry_exponent(u32 entry, const Header& header) {
  const u32 four = __shfl_sync(kAllLanes, header.table, static_cast<int>(entry >> 12 & 15));  // [15:12]
  const u32 narrow = __byte_perm(four, 0, 0x4440 | (entry >> 10 & 3));                        // [11:10]
  return header.wide ? entry >> 16 & 0xFF : narrow;                                           // [23:16]
}

__device__ __forceinline__ u16 with_exponent(u16 weight, u32 exponent) {
  return static_cast<u16>((weight & ~kExponentBits) | exponent << kExponentShift);
}

// A run's escapes: lane j has the first entry and the number of entries of the run's tile j. At most 31 tiles.
struct RunEscapes {
  u32 first, count;
};

__device__ __forceinline__ RunEscapes load_run_escapes(const u32* gmem_offsets, u64 tile, u32 tiles, u32 capacity,
                                                       u32 lane) {
  const u32 first = min(__ldg(gmem_offsets + tile + min(lane, tiles)), capacity);
  const u32 next = __shfl_down_sync(kAllLanes, first, 1);
  return {first, next > first ? min(next - first, kTileWeights) : 0};
}

// Puts the exponents of a tile's escapes in place: lane e has entry e. Called by all lanes of a warp.
__device__ __forceinline__ void patch(u16* smem_tile, u32 lane, const u8* gmem_escapes, u32 entry, u32 first,
                                      u32 entries, const Header& header) {
  for (u32 done = 0;;) {
    const u32 exponent = entry_exponent(entry, header);
    if (done + lane < entries) {
      u16* weight = smem_tile + staged(entry & (kTileWeights - 1));  // [9:0] position
      *weight = with_exponent(*weight, exponent);
    }
    done += kWarp;
    if (done >= entries) return;  // more than 32 are rare
    entry = done + lane < entries ? load_entry(gmem_escapes, first + done + lane, header.wide) : 0;
  }
}
