// DFloat11: one block of a stream, 4096 bytes, to BF16.
//
// The format's index gives the position of the first code in every window of 64 bits and the output position of every
// block. A thread decodes the codes that start in two windows, its 128 bits; a block of 256 threads decodes a block.
//
//   1. Each thread decodes its bits once, up to 4 exponents per look-up of 11 bits, into a slot of its own in shared
//      memory. Longer codes (about 1 in 2000) walk the stored tables, in shared memory too.
//   2. Counts are summed up over lanes and, behind a barrier, over warps: now each thread knows its place.
//   3. Exponents move from the slots to their places, gap-free and aligned as the output is. Barrier.
//   4. All threads join exponents with signs and mantissas, 8 weights each: 8-byte loads, under way since before
//      step 1, and 16-byte stores, both in the order of threads.
//
// The budget, for 2.67 bits per exponent (48 codes per thread), counted in the SASS for sm_90a, where the slowest of 32
// lanes decides: 16.3 look-ups of 16 instructions per thread make 5.5 instructions per weight, what surrounds them 1.3,
// long codes 0.9, loads and addresses 2.3, sums 2.3, moves to places 3, joins 2.8: about 18, 10 of them on the integer
// ALU. Shared memory per weight: 2.7 bytes of look-ups, 2 of slots, 2 of places. A block of threads has 56 registers
// per thread, 47 KiB of shared memory (if no code has 1 bit) and 16 KiB under way: 12 of signs and mantissas and the
// next block's 4 of the stream. Four run per multiprocessor with 228 KiB, three with 164, two with 100.
#pragma once
#include "portable.cuh"

constexpr u32 kThreads = 256;
constexpr u32 kWarps = kThreads / kWarp;
constexpr u32 kThreadWords = 4;                      // of the stream: 128 bits
constexpr u32 kGapBits = 5;                          // a gap for every thread
constexpr u32 kGapWords = kThreads * kGapBits / 32;  // of a block
constexpr u32 kLookupBits = 11;
constexpr u32 kLookups = 1u << kLookupBits;
constexpr u32 kRowBytes = 256;
constexpr u32 kFirstPointer = 240;
constexpr u32 kAhead = 7;  // vectors of signs and mantissas that a thread loads before it decodes

constexpr u32 kStatusCorrupt = 1;
constexpr u32 kStatusIndex = 2;

// What a look-up adds to the state of a thread.
//   [6:0] bits, [7] the code is longer than the look-up, [10:8] 0, [18:11] exponents,
//   [30:20] bit 19 + k: one of its codes ends k bits on (k from 1 to 11). In a state: rubbish.
// In a state [6:0] is the position relative to the word of the stream that is being decoded.
constexpr u32 kLong = 0x80;
constexpr u32 kWordEnd = 0xE0;  // at the next word, or a long code
constexpr u32 kCountShift = 11, kEndsShift = 19;
constexpr u32 kSlotWord = 4u << kCountShift;  // flips when a word of 4 exponents is full
constexpr u32 kNowhere = 63;                  // no gap

struct Unit {
  const u8* tables;  // look-ups (8 bytes each: state, 4 exponents), then the rows of the stored tables
  const u32* stream;
  const u8* sign_mantissa;
  const u32* gaps;       // [blocks][kGapWords], first gap in the highest bits
  const u32* positions;  // [blocks + 1]
  u32 blocks, elements;
  u32 stream_words;   // a multiple of 4
  u32 rows;           // of the stored tables: the last one has the lengths
  u32 shortest;       // bits of the shortest code
  u32 slot_words;     // of a thread: room for 127 / shortest + 4 exponents
  u32 block_symbols;  // most weights of a block
};

struct Shared {
  uint2* lookups;  // [kLookups]
  u8* rows;        // [rows][256]
  u32* totals;     // [kWarps] [15:0] exponents of a warp, [31:16] bits of its last one beyond its last thread's
  u32* slots;      // [slot_words][kThreads]
  u8* exponents;   // [block_symbols + 7], padded to 16
};

// What a thread needs of memory for one block, as stored: nothing here waits for the loads.
struct Window {
  u32 words[kThreadWords + 1];  // the last one belongs to the next thread
  u32 gaps[2];                  // the gap begins in the first one
  u32 positions[2];             // of the block and of the next
};

// A look-up, or, if it is none that slots have room for, "a long code", which is decoded with every check.
__device__ __forceinline__ uint2 checked(uint2 entry, u32 shortest) {
  const u32 bits = entry.x & 0x7F, count = entry.x >> kCountShift & 7, ends = entry.x >> kEndsShift;
  const bool good = count >= 1 && count <= 4 && bits >= count * shortest && bits <= kLookupBits &&
                    u32(__popc(ends)) == count && ends >> bits == 1 &&
                    entry.x == (bits | count << kCountShift | ends << kEndsShift);
  return good ? entry : make_uint2(kLong, 0);
}

__device__ __forceinline__ Shared load_tables(const Unit& unit, u8* smem) {
  Shared shared;
  shared.lookups = reinterpret_cast<uint2*>(smem);
  shared.rows = smem + kLookups * sizeof(uint2);
  shared.totals = reinterpret_cast<u32*>(shared.rows + unit.rows * kRowBytes);
  shared.slots = shared.totals + kWarps;
  shared.exponents = reinterpret_cast<u8*>(shared.slots + unit.slot_words * kThreads);
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
  const u32 at = kThreadWords * (block * kThreads + threadIdx.x);
  uint4 four = make_uint4(0, 0, 0, 0);
  if (at < unit.stream_words) four = load_once(reinterpret_cast<const uint4*>(unit.stream + at));
  window.words[0] = four.x;
  window.words[1] = four.y;
  window.words[2] = four.z;
  window.words[3] = four.w;
  window.words[4] = at + 4 < unit.stream_words ? unit.stream[at + 4] : 0;
  // Behind the last gap are the positions: there is always a next word.
  const u32* gaps = unit.gaps + (block * kGapWords + kGapBits * threadIdx.x / 32);
  window.gaps[0] = gaps[0];
  window.gaps[1] = gaps[1];
  window.positions[0] = unit.positions[block];
  window.positions[1] = unit.positions[block + 1];
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
  u32 count;   // codes that start in the thread's bits
  u32 beyond;  // bits of the last one beyond them; kNowhere if it is none
};

// Exponents of the codes that start in a thread's bits, to its slot (up to 3 more behind them).
__device__ __forceinline__ Decoded decode_window(const Unit& unit, const Shared& shared, const Window& window,
                                                 u32 gap) {
  u32 words[kThreadWords + 1];
#pragma unroll
  for (u32 i = 0; i <= kThreadWords; ++i) words[i] = __byte_perm(window.words[i], 0, 0x0123);  // first bit highest
  u32 state = gap, last = 0, partial = 0;
  bool broken = false;
  u32* slot = shared.slots + threadIdx.x;
  const auto put = [&](u32 step, u32 symbols) {
    const u32 shift = state >> (kCountShift - 3);  // [4:0] 8 * exponents of the partial word
    partial |= __funnelshift_l(0, symbols, shift);
    const u32 next = state + step;
    if ((next ^ state) & kSlotWord) {
      *slot = partial;
      slot += kThreads;
      partial = __funnelshift_l(symbols, 0, shift);
    }
    state = next;
    last = step;
  };
#pragma unroll
  for (u32 word = 0; word < kThreadWords; ++word) {
    for (;;) {
      while ((state & kWordEnd) == 0) {
        const uint2 entry = shared.lookups[__funnelshift_l(words[word + 1], words[word], state) >> (32 - kLookupBits)];
        put(entry.x, entry.y);
      }
      if ((state & kLong) == 0 || broken) break;
      const u32 code = long_code(unit, shared.rows, __funnelshift_l(words[word + 1], words[word], state));
      if (code == 0) {
        broken = true;
        state |= 0x7F;
        break;
      }
      state &= ~kLong;
      put(code >> 8 | 1u << kCountShift, code & 0xFF);
      last = 0;
    }
    state -= 32;
  }
  const u32 count = state >> kCountShift & 0xFF;
  if (count % 4 != 0) *slot = partial;
  if (broken) return {count, kNowhere};
  // Ends of the last look-up's codes at the end of the bits or beyond; codes behind the first of them are not ours.
  const u32 beyond = state & 0x7F;
  if (last == 0) return {count, beyond};
  const u32 ends = (last >> kEndsShift) >> ((last & 0x7F) - beyond);
  return {count - u32(__popc(ends)) + 1, u32(__ffs(int(ends))) - 1};
}

// Moves a thread's exponents to the bytes from `to` on of the block's.
__device__ __forceinline__ void compact(const Shared& shared, u32 to, u32 count) {
  const u32* slot = shared.slots + threadIdx.x;
  const u32 skip = to % 4, end = to + count;
  u32 at = to - skip, before = 0;
  // Words that are others' too are written byte by byte.
  if (skip != 0) {
    before = *slot;
    slot += kThreads;
#pragma unroll
    for (u32 i = 1; i < 4; ++i) {
      if (i >= skip && at + i < end) shared.exponents[at + i] = static_cast<u8>(before >> 8 * (i - skip));
    }
    at += 4;
  }
  u32* words = reinterpret_cast<u32*>(shared.exponents + at);
#pragma unroll 4
  for (u32 left = at < end ? (end - at) / 4 : 0; left != 0; --left) {
    const u32 next = *slot;
    *words = __funnelshift_l(before, next, 8 * skip);
    before = next;
    slot += kThreads;
    ++words;
  }
  if (at < end) {
    const u32 rest = (end - at) % 4;
    u8* bytes = reinterpret_cast<u8*>(words);
    const u32 value = __funnelshift_l(before, rest > skip ? *slot : 0, 8 * skip);
#pragma unroll
    for (u32 i = 0; i < 3; ++i) {
      if (i < rest) bytes[i] = static_cast<u8>(value >> 8 * i);
    }
  }
}

// Bits of `ones` where the mask has ones, of `zeros` elsewhere.
__device__ __forceinline__ u32 merged(u32 mask, u32 ones, u32 zeros) {
#ifdef BITFORBIT_CUDA_SHIM
  return (mask & ones) | (~mask & zeros);
#else
  u32 result;  // the compiler makes two instructions of it where the mask is known
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(result) : "r"(mask), "r"(ones), "r"(zeros));
  return result;
#endif
}

// Four weights, a pair per word, from their exponents and signs with mantissas, a byte each.
__device__ __forceinline__ uint2 join4(u32 exponents, u32 signs) {
  // Of each weight: high byte [7] sign, [6:0] exponent's upper bits; low byte [7] its lowest bit, [6:0] mantissa.
  const u32 high = merged(0x80808080u, signs, exponents >> 1), low = merged(0x80808080u, exponents << 7, signs);
  return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

__device__ __forceinline__ uint4 join8(uint2 exponents, uint2 signs) {
  const uint2 a = join4(exponents.x, signs.x), b = join4(exponents.y, signs.y);
  return make_uint4(a.x, a.y, b.x, b.y);
}

// Decodes a block. Those of its weights that are in [begin, end) go to `out`, where weight `begin` has the first place.
__device__ __forceinline__ void decode_block(const Unit& unit, const Shared& shared, const Window& window, u32 begin,
                                             u32 end, u16* gmem_out, u32* status) {
  const u32 lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const u32 gap = __funnelshift_l(window.gaps[1], window.gaps[0], kGapBits * threadIdx.x) >> (32 - kGapBits);
  const u32 base = min(window.positions[0], unit.elements);
  const u32 weights = min(max(min(window.positions[1], unit.elements), base) - base, unit.block_symbols);
  // Vectors are 8 weights that share 16 bytes of the output. Weight g has place g - base + align among the block's.
  const u32 out_words = static_cast<u32>(reinterpret_cast<u64>(gmem_out) / sizeof(u16));
  const u32 align = (out_words + base - begin) % 8;
  const u32 first = max(base, begin) - base + align;
  const u32 stop = max(max(min(base + weights, end), base) - base + align, first);
  // Vectors [first / 8 up, stop / 8 down) are whole.
  const u32 vector_begin = (first + 7) / 8, vector_end = stop / 8;
  const u32 vector = vector_begin + threadIdx.x;
  const i32 vectors = static_cast<i32>(vector_end) - static_cast<i32>(vector);  // from the thread's first one on
  // Place 0 is at this byte of the signs and mantissas; it may lie before the first.
  const i64 origin = static_cast<i64>(base) - align;
  const u8* gmem_signs = unit.sign_mantissa + origin;
  u16* gmem_places = gmem_out + (origin - static_cast<i64>(begin));
  const u32 skew = static_cast<u32>(origin) % 8;

  const uint2* gmem_pairs = reinterpret_cast<const uint2*>(gmem_signs) + vector;
  uint2 ahead[kAhead];
  if (skew == 0) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
      if (vectors > static_cast<i32>(i * kThreads)) ahead[i] = load_once(gmem_pairs + i * kThreads);
    }
  }

  const Decoded decoded = decode_window(unit, shared, window, gap);

  u32 upto = decoded.count;  // exponents of the warp up to this thread's
#pragma unroll
  for (u32 step = 1; step < kWarp; step *= 2) {
    const u32 other = __shfl_up_sync(kAllLanes, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == kWarp - 1) shared.totals[warp] = upto | decoded.beyond << 16;
  u32 expected = __shfl_up_sync(kAllLanes, decoded.beyond, 1);  // gap, as the thread before has it
  __syncthreads();
  const u32 total = lane < kWarps ? shared.totals[lane] & 0xFFFF : 0;
  // [15:0] exponents of the warps before, [31:16] of all: up to 256 * 128.
  const u32 sums = __reduce_add_sync(kAllLanes, total << 16 | (lane < warp ? total : 0));
  if (lane == 0) expected = warp == 0 ? gap : shared.totals[warp - 1] >> 16;
  const u32 place = (sums & 0xFFFF) + upto - decoded.count;
  // Every thread that has a weight begins where the one before ends. What follows a unit's last code is filling.
  const u32 codes = sums >> 16;
  const bool whole = codes == weights || (codes > weights && base + weights == unit.elements);
  if (((place < weights && gap != expected) || !whole) && status != nullptr) atomicOr(status, kStatusCorrupt);

  const u32 kept = min(decoded.count, max(weights, place) - place);
  if (kept != 0) compact(shared, align + place, kept);
#pragma unroll 1
  for (u32 i = codes + threadIdx.x; i < weights; i += kThreads) shared.exponents[align + i] = 0;  // codes are missing
  __syncthreads();

  const uint2* exponents = reinterpret_cast<const uint2*>(shared.exponents) + vector;
  uint4* gmem_vectors = reinterpret_cast<uint4*>(gmem_places) + vector;
  if (skew == 0) {
#pragma unroll
    for (u32 i = 0; i < kAhead; ++i) {
      if (vectors <= static_cast<i32>(i * kThreads)) break;
      gmem_vectors[i * kThreads] = join8(exponents[i * kThreads], ahead[i]);
    }
#pragma unroll 1
    for (i32 i = kAhead * kThreads; i < vectors; i += kThreads) {
      gmem_vectors[i] = join8(exponents[i], load_once(gmem_pairs + i));
    }
  } else {
    // The output is aligned otherwise than signs and mantissas: eight bytes from three words.
    const u32* gmem_words = reinterpret_cast<const u32*>(gmem_signs - skew % 4) + 2 * vector;
    const u32 shift = 8 * (skew % 4);
#pragma unroll 2
    for (i32 i = 0; i < vectors; i += kThreads) {
      const u32* three = gmem_words + 2 * i;
      const u32 second = three[1], third = shift == 0 ? 0 : three[2];
      gmem_vectors[i] = join8(
          exponents[i], make_uint2(__funnelshift_r(three[0], second, shift), __funnelshift_r(second, third, shift)));
    }
  }
  // Weights before the first whole vector, and behind the last one.
  if (threadIdx.x < 16) {
    const bool head = threadIdx.x < 8;
    const u32 at = (head ? first & ~7u : max(vector_end, vector_begin) * 8) + threadIdx.x % 8;
    if (at >= first && at < min(stop, head ? vector_begin * 8 : stop)) {
      gmem_places[at] = static_cast<u16>(join4(shared.exponents[at], gmem_signs[at]).x);
    }
  }
}
