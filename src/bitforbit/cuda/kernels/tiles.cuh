// The tile layout (cuda/tiles/layout.py says where every bit lies): a lane's share of a tile, from memory to weights.
#pragma once
#include "portable.cuh"

constexpr u32 kTileRows = 16, kTileCols = 64, kTileWeights = 1024, kTileBytes = 1408;
constexpr u32 kTileCodes = 1024;  // byte at which the codes begin
constexpr u32 kPairs = 16;        // of a lane: two weights in a register, in the order of the matrix instruction

constexpr u32 kExponentBits = 0x7F80;          // of a BF16 weight: [14:7]
constexpr u32 kSignMantissaPair = 0x807F807F;  // of a pair: [31], [22:16], [15], [6:0]
constexpr u32 kExponentPair = 0x00800080;      // a pair of ones at the exponents' lowest bits

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

// Lane `lane`'s words of sign and mantissa, and of codes: two loads of 16 bytes, three of 4, coalesced.
__device__ __forceinline__ void load_lane(const u8* gmem_tile, u32 lane, u32 (&word)[8], u32 (&code)[3]) {
  const uint4 low = load_once(reinterpret_cast<const uint4*>(gmem_tile) + lane);
  const uint4 high = load_once(reinterpret_cast<const uint4*>(gmem_tile) + 32 + lane);
  word[0] = low.x, word[1] = low.y, word[2] = low.z, word[3] = low.w;
  word[4] = high.x, word[5] = high.y, word[6] = high.z, word[7] = high.w;
#pragma unroll
  for (u32 w = 0; w < 3; ++w) code[w] = load_once(reinterpret_cast<const u32*>(gmem_tile + kTileCodes) + 32 * w + lane);
}

// Sign and mantissa of pair p, at their places; the exponents' bits are garbage.
__device__ __forceinline__ u32 sign_mantissa_pairs(const u32 (&word)[8], u32 p) {
  return p % 2 == 0 ? word[p / 2] : __byte_perm(word[p / 2], 0, 0x0321);  // rotated right by 8
}

// Exponents of pair p, at [14:7] and [30:23]: base_pair (base * kExponentPair) plus the codes. A mask, then a
// multiplication by a power of two, which moves the codes to [9:7] and [25:23] and adds the base in the same
// instruction, on the pipe that the other instructions leave free.
__device__ __forceinline__ u32 exponents(const u32 (&code)[3], u32 p, u32 base_pair) {
  if (p == 15) {  // one bit of each word: [16] and [0]
    const u32 bits = multiply_add<4>(code[2] & 0x00010001, multiply_add<2>(code[1] & 0x00010001, code[0] & 0x00010001));
    return multiply_add<128>(bits, base_pair);
  }
  const u32 word = code[p / 5];
  switch (p % 5) {
    case 0: return multiply_add<64>(word & 0x000E000E, base_pair);       // [3:1] and [19:17]
    case 1: return multiply_add<8>(word & 0x00700070, base_pair);        // [6:4] and [22:20]
    case 2: return (word & 0x03800380) + base_pair;                      // [9:7] and [25:23]
    case 3: return multiply_add<64>(word >> 9 & 0x000E000E, base_pair);  // [12:10] and [28:26]
    default: return multiply_add<8>(word >> 9 & 0x00700070, base_pair);  // [15:13] and [31:29]
  }
}

// A lane's 32 weights: pair[4i + r] is register r of step i. Escapes have the base as their exponent.
__device__ __forceinline__ void decode_lane(const u32 (&word)[8], const u32 (&code)[3], u32 base_pair,
                                            u32 (&pair)[kPairs]) {
#pragma unroll
  for (u32 p = 0; p < kPairs; ++p) {
    pair[p] = (sign_mantissa_pairs(word, p) & kSignMantissaPair) | exponents(code, p, base_pair);
  }
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
  u32 base_pair;  // base at [14:7] and [30:23]
  u32 wide;       // entries are 4 bytes
  u32 table;      // lane l: exponents 4 * (l mod 16) to + 3 of the table
};

__device__ __forceinline__ Header load_header(const u8* gmem_header, u32 lane) {
  const u32* words = reinterpret_cast<const u32*>(gmem_header);
  return {(__ldg(words + kHeaderBase / 4) & 0xFF) * kExponentPair,
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
  return static_cast<u16>((weight & ~kExponentBits) | exponent << 7);
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
