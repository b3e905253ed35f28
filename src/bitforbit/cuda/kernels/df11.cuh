// DFloat11: one block of a stream, 4096 bytes, to BF16. docs/guide and the codec's modules describe the format.
//
// A thread decodes the codes that start in its window of 64 bits; a block has 512 windows. The index gives the offset of
// each window's first code (5 bits) and the output position of each block.
//
//   1. Each thread decodes its window once, up to 4 exponents per look-up of 11 bits, into a slot of its own in shared
//      memory. Longer codes walk the stored tables (about 1 code in 2000).
//   2. The counts are summed up over lanes, then, behind a barrier, over warps: now each window knows its place.
//   3. Exponents move from the slots to where they belong, gap-free and aligned as the output is. Barrier.
//   4. All threads join exponents with signs and mantissas, 8 weights each: 8-byte loads, which were under way since
//      step 0, and 16-byte stores, both in the order of threads.
//
// Numbers per weight, for 2.67 bits per exponent (24 codes per window): 0.34 look-ups counted per warp (the slowest lane
// of 32 decides), 14 instructions each; shared memory 2.7 bytes of look-ups, 1 written and 1 read of slots, 1 written and
// 1 read of exponents. A block has 4 KiB of stream, 12 KiB of signs and mantissas under way.
#pragma once
#include "portable.cuh"

constexpr u32 kThreads = 512;  // windows of a block
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kBlockBytes = 4096;
constexpr u32 kGapWords = 80;     // of a block: 512 gaps of 5 bits
constexpr u32 kIndexHeader = 64;  // bytes
constexpr u32 kLookupBits = 11;
constexpr u32 kLookups = 1u << kLookupBits;
constexpr u32 kRowBytes = 256;
constexpr u32 kFirstPointer = 240;
constexpr u32 kAhead = 4;  // vectors of signs and mantissas that a thread loads before it decodes

constexpr u32 kStatusCorrupt = 1;
constexpr u32 kStatusIndex = 2;

// What a look-up adds to the state of a window.
//   [6:0] bits, [7] the code is longer than the look-up, [10:8] 0, [17:11] exponents,
//   [29:18] bit 18 + k: one of its codes ends k bits on (k from 1 to 11). In a state: rubbish.
constexpr u32 kLong = 0x80;
constexpr u32 kCountShift = 11, kEndsShift = 18;
constexpr u32 kWordDone = 4u << kCountShift;  // flips when a word of 4 exponents is full

struct Unit {
  const u8* tables;  // look-ups (8 bytes each: state, 4 exponents), then the rows of the stored tables
  const u32* stream;
  const u8* sign_mantissa;
  const u32* positions;  // [blocks + 1]
  const u32* gaps;       // [blocks][kGapWords], first gap in the highest bits
  u32 blocks, elements;
  u32 stream_words;
  u32 rows;           // of the stored tables: the last one has the lengths
  u32 shortest;       // bits of the shortest code
  u32 slot_words;     // of a window: room for 63 / shortest + 4 exponents
  u32 block_symbols;  // most weights of a block
};

struct Shared {
  uint2* lookups;  // [kLookups]
  u8* rows;        // [rows][256]
  u32* slots;      // [slot_words][kThreads]
  u8* exponents;   // [block_symbols + 7], padded to 16
  u32* totals;     // [kWarps] [15:0] exponents of a warp, [31:16] bits beyond its last window
};

// What a thread needs of memory for one block.
struct Window {
  u32 words[3];  // as stored; the last one belongs to the next window
  u32 gap;
  u32 base, end;  // weights of the block
};

__device__ __forceinline__ u32 big_endian(u32 x) { return __byte_perm(x, 0, 0x0123); }

__device__ __forceinline__ Unit make_unit(const u8* tables, const u8* stream, const u8* sign_mantissa, const u8* index,
                                          u32 blocks, u32 elements, u32 stream_words, u32 rows, u32 shortest,
                                          u32 slot_words, u32 block_symbols) {
  // Positions are padded to 16 bytes.
  const u32* positions = reinterpret_cast<const u32*>(index + kIndexHeader);
  const u32* gaps = positions + (blocks + 4) / 4 * 4;
  return {tables, reinterpret_cast<const u32*>(stream), sign_mantissa, positions, gaps, blocks, elements, stream_words,
          rows, shortest, slot_words, block_symbols};
}

// A look-up, or, if it is none that the state can take, "a long code", which is decoded with every check.
__device__ __forceinline__ uint2 checked(uint2 entry, u32 shortest) {
  const u32 bits = entry.x & 0x7F, count = entry.x >> kCountShift & 7, ends = entry.x >> kEndsShift;
  const bool good = count >= 1 && count <= 4 && bits >= count * shortest && bits <= kLookupBits &&
                    u32(__popc(ends)) == count && ends >> bits == 1 &&
                    entry.x == (bits | count << kCountShift | ends << kEndsShift);
  return good ? entry : make_uint2(kLong, 0);
}

__device__ __forceinline__ Shared load_tables(const Unit& unit, u8* smem, u32* smem_totals) {
  Shared shared;
  shared.lookups = reinterpret_cast<uint2*>(smem);
  shared.rows = smem + kLookups * sizeof(uint2);
  shared.slots = reinterpret_cast<u32*>(shared.rows + unit.rows * kRowBytes);
  shared.exponents = reinterpret_cast<u8*>(shared.slots + unit.slot_words * kThreads);
  shared.totals = smem_totals;
  const uint4* from = reinterpret_cast<const uint4*>(unit.tables);
  for (u32 i = threadIdx.x; i < kLookups / 2; i += kThreads) {
    const uint4 two = from[i];
    shared.lookups[2 * i] = checked(make_uint2(two.x, two.y), unit.shortest);
    shared.lookups[2 * i + 1] = checked(make_uint2(two.z, two.w), unit.shortest);
  }
  uint4* rows = reinterpret_cast<uint4*>(shared.rows);
  for (u32 i = threadIdx.x; i < unit.rows * (kRowBytes / 16); i += kThreads) rows[i] = from[kLookups / 2 + i];
  __syncthreads();
  return shared;
}

__device__ __forceinline__ Window load_window(const Unit& unit, u32 block) {
  Window window;
  const u32 at = 2 * (block * kThreads + threadIdx.x);
  if (at + 2 < unit.stream_words) {
    const uint2 two = load_once(reinterpret_cast<const uint2*>(unit.stream + at));
    window.words[0] = two.x;
    window.words[1] = two.y;
    window.words[2] = unit.stream[at + 2];
  } else {
    for (u32 i = 0; i < 3; ++i) window.words[i] = at + i < unit.stream_words ? unit.stream[at + i] : 0;
  }
  const u32 bit = 5 * threadIdx.x, word = bit / 32;
  const u32* gaps = unit.gaps + static_cast<u64>(block) * kGapWords;
  window.gap = __funnelshift_l(gaps[min(word + 1, kGapWords - 1)], gaps[word], bit) >> 27;
  window.base = min(unit.positions[block], unit.elements);
  window.end = max(min(min(unit.positions[block + 1], unit.elements), window.base + unit.block_symbols), window.base);
  return window;
}

// [7:0] exponent, [31:8] its length; 0: no code starts with these bits.
__device__ __forceinline__ u32 long_code(const Unit& unit, const u8* smem_rows, u32 bits) {
  u32 table = 0;
  for (u32 level = 0; level < 4; ++level) {
    const u32 value = smem_rows[table * kRowBytes + (bits >> (24 - 8 * level) & 0xFF)];
    if (value < kFirstPointer) {
      const u32 length = smem_rows[(unit.rows - 1) * kRowBytes + value];
      const bool good = length > 8 * level && length <= 8 * level + 8 && length >= unit.shortest;
      return good ? length << 8 | value : 0;
    }
    table = kRowBytes - value;
    if (table >= unit.rows - 1) return 0;
  }
  return 0;
}

struct Decoded {
  u32 count;   // codes that start in the window
  u32 beyond;  // bits of the last one beyond the window
};

// Exponents of the codes that start in a window, to the thread's slot (up to 3 more behind them).
__device__ __forceinline__ Decoded decode_window(const Unit& unit, const Shared& shared, const Window& window) {
  const u32 words[3] = {big_endian(window.words[0]), big_endian(window.words[1]), big_endian(window.words[2])};
  u32 state = window.gap, last = 0, word = 0;
  u32* slot = shared.slots + threadIdx.x;
  const auto put = [&](u32 step, u32 symbols) {
    const u32 shift = state >> (kCountShift - 3);  // [4:0] 8 * (exponents in the word)
    const u32 rest = __funnelshift_l(symbols, 0, shift);
    word |= __funnelshift_l(0, symbols, shift);
    const u32 next = state + step;
    if ((next ^ state) & kWordDone) {
      *slot = word;
      slot += kThreads;
      word = rest;
    }
    state = next;
    last = step;
  };
#pragma unroll
  for (u32 half = 0; half < 2; ++half) {
    // [6:0] of the state reaches the end of the half; [7] a long code.
    const u32 stop = half == 0 ? 0xE0 : 0xC0;
    for (;;) {
      while ((state & stop) == 0) {
        const uint2 entry = shared.lookups[__funnelshift_l(words[half + 1], words[half], state) >> (32 - kLookupBits)];
        put(entry.x, entry.y);
      }
      if ((state & kLong) == 0) break;
      state &= ~kLong;
      const u32 code = long_code(unit, shared.rows, __funnelshift_l(words[half + 1], words[half], state));
      if (code != 0) {
        put(code >> 8 | 1u << kCountShift, code & 0xFF);
        last = 0;
      } else {
        state |= 0x7F;  // stop; no window begins 63 bits on
        last = 0;
      }
    }
  }
  const u32 count = state >> kCountShift & 0x7F, bits = state & 0x7F;
  if (count % 4 != 0) *slot = word;
  // Ends of the last look-up's codes at 64 bits or beyond; codes that start behind the first of them are not ours.
  const u32 ends = (last >> kEndsShift) >> min(64 - bits + (last & 0x7F), 31u);
  if (ends == 0) return {count, bits - 64};
  return {count - u32(__popc(ends)) + 1, u32(__ffs(int(ends))) - 1};
}

// Two weights: [15:0] and [31:16], from the bytes of exponents and signs with mantissas that the selectors name.
template <u32 kDup, u32 kSpread>
__device__ __forceinline__ u32 join(u32 exponents, u32 sign_mantissa) {
  // [15:8], [31:24] of the spread: exponents; one bit down is their place.
  return (__byte_perm(sign_mantissa, 0, kDup) & 0x807F807Fu) | __byte_perm(exponents, 0, kSpread) >> 1;
}

// Moves a window's exponents to bytes `to` .. of the block's.
__device__ __forceinline__ void compact(const Shared& shared, u32 to, u32 count) {
  const u32* slot = shared.slots + threadIdx.x;
  const u32 shift = 8 * to;  // only [4:0] matters
  const u32 end = to + count;
  u32 at = to & ~3u;
  u32 before = 0;
  // Words that others share are written byte by byte.
  const auto put_bytes = [&](u32 value) {
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
      if (at + i >= to && at + i < end) shared.exponents[at + i] = static_cast<u8>(value >> 8 * i);
    }
  };
  if (at != to) {
    before = *slot;
    put_bytes(before << (shift & 31));
    slot += kThreads;
    at += 4;
  }
  while (at + 4 <= end) {
    // The last one may hold nothing that the slot still has: the word is then complete without it.
    const u32 next = *slot;
    *reinterpret_cast<u32*>(shared.exponents + at) = __funnelshift_l(before, next, shift);
    before = next;
    slot += kThreads;
    at += 4;
  }
  if (at < end) put_bytes(__funnelshift_l(before, *slot, shift));
}

// Decodes a block; its weights from `begin` on and before `end` go to `out`, the first of them (weight `begin`) to out[0].
__device__ __forceinline__ void decode_block(const Unit& unit, const Shared& shared, const Window& window, u32 begin,
                                             u32 end, u16* gmem_out, u32* status) {
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const u32 weights = window.end - window.base;
  // Vectors are 8 weights that share 16 bytes of the output. Weight g has place g - base + align in the block's vectors.
  const u32 out_words = static_cast<u32>(reinterpret_cast<u64>(gmem_out) / sizeof(u16));
  const u32 align = (out_words + window.base - begin) % 8;
  const u32 first = max(window.base, begin) - window.base + align;
  const u32 stop = max(min(window.end, end), window.base) - window.base + align;
  const u32 vector_end = first < stop ? (stop + 7) / 8 : 0;
  const u32 vector_begin = first / 8 + threadIdx.x;
  // Signs and mantissas of vector v begin at byte base - align + 8v.
  const i64 origin = static_cast<i64>(window.base) - align;
  const u32 skew = static_cast<u32>(origin) % 8;
  const u8* gmem_signs = unit.sign_mantissa + origin;

  uint2 ahead[kAhead];
  if (skew == 0) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
      const u32 v = vector_begin + i * kThreads;
      if (v < vector_end) ahead[i] = load_once(reinterpret_cast<const uint2*>(gmem_signs + 8 * v));
    }
  }

  const Decoded decoded = decode_window(unit, shared, window);

  u32 upto = decoded.count;  // exponents of the warp's windows up to this one
#pragma unroll
  for (u32 step = 1; step < kWarp; step *= 2) {
    const u32 other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == kWarp - 1) shared.totals[warp] = upto | decoded.beyond << 16;
  u32 gap = __shfl_up_sync(kAllLanes, decoded.beyond, 1);  // of this window, as the one before has it
  __syncthreads();
  const u32 total = lane < kWarps ? shared.totals[lane] & 0xFFFF : 0;
  // [15:0] exponents of the warps before, [31:16] of all: up to 512 * 64.
  const u32 sums = __reduce_add_sync(kAllLanes, total << 16 | (lane < warp ? total : 0));
  if (lane == 0) gap = warp == 0 ? window.gap : shared.totals[warp - 1] >> 16;
  const u32 place = (sums & 0xFFFF) + upto - decoded.count;
  // Every window that holds a weight begins where the one before ends. The last block's rest is filling.
  const bool whole = window.end == unit.elements ? sums >> 16 >= weights : sums >> 16 == weights;
  if (status != nullptr && ((place < weights && gap != window.gap) || !whole)) atomicOr(status, kStatusCorrupt);

  if (place < weights) compact(shared, align + place, min(decoded.count, weights - place));
  __syncthreads();

  const uint2* exponents = reinterpret_cast<const uint2*>(shared.exponents);
  u16* gmem_vectors = gmem_out + (origin - static_cast<i64>(begin));
  const auto put = [&](u32 v, uint2 signs) {
    const uint2 e = exponents[v];
    const uint4 joined = make_uint4(join<0x1100, 0x1404>(e.x, signs.x), join<0x3322, 0x3424>(e.x, signs.x),
                                    join<0x1100, 0x1404>(e.y, signs.y), join<0x3322, 0x3424>(e.y, signs.y));
    u16* gmem_vector = gmem_vectors + 8 * static_cast<u64>(v);
    if (8 * v >= first && 8 * v + 8 <= stop) {
      *reinterpret_cast<uint4*>(gmem_vector) = joined;
    } else {
      const u32 pairs[4] = {joined.x, joined.y, joined.z, joined.w};
#pragma unroll
      for (u32 i = 0; i < 8; ++i) {
        if (8 * v + i >= first && 8 * v + i < stop) gmem_vector[i] = static_cast<u16>(pairs[i / 2] >> 16 * (i % 2));
      }
    }
  };
  if (skew == 0) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
      const u32 v = vector_begin + i * kThreads;
      if (v < vector_end) put(v, ahead[i]);
    }
    for (u32 v = vector_begin + kAhead * kThreads; v < vector_end; v += kThreads) {
      put(v, load_once(reinterpret_cast<const uint2*>(gmem_signs + 8 * v)));
    }
  } else {
    // The output is aligned otherwise than the signs: four bytes from two words each.
    const i64 words = (static_cast<i64>(unit.elements) + 3) / 4;
    const u32* gmem_words = reinterpret_cast<const u32*>(unit.sign_mantissa);
    for (u32 v = vector_begin; v < vector_end; v += kThreads) {
      const i64 at = (origin + 8 * static_cast<i64>(v)) >> 2;  // origin may be negative
      u32 three[3];
#pragma unroll
      for (u32 i = 0; i < 3; ++i) three[i] = at + i >= 0 && at + i < words ? gmem_words[at + i] : 0;
      const u32 shift = 8 * (skew % 4);
      put(v, make_uint2(__funnelshift_r(three[0], three[1], shift), __funnelshift_r(three[1], three[2], shift)));
    }
  }
}
