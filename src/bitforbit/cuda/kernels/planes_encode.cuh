// How each float kind is read from device memory and split into exponents and planes (docs/format.md, section 3).
//
// The unit of work of a thread is a *quarter*: positions 16q to 16q + 15 of a group, q = 0 to 3. Four neighbouring
// lanes hold a group. Values go by the byte, four positions to a word: word k has the four from 16q + 4k on.
//
// BITFORBIT_KIND is a name of Kind; BITFORBIT_WIDE is 1 where BF16 is kept as F32 whose low 16 bits are zero, else 0.
#pragma once

#include "planes_common.cuh"

// Groups of a block of that many rows: whole tile rows, then the edge columns run together.
__device__ __forceinline__ u32 groups_in(u32 rows, u32 cols) {
  return rows * (cols / kGroup) + (rows * (cols % kGroup) + kGroup - 1) / kGroup;
}

enum Kind { kBF16, kF16, kF32, kF8E4M3, kF8E5M2 };
constexpr Kind kKind = BITFORBIT_KIND;
constexpr bool kWide = BITFORBIT_WIDE;

constexpr u32 kQuarter = kGroup / kGroupLanes;
constexpr u32 kCodedRanks = 9;

constexpr u32 kItem = kKind == kF32 || kWide ? 4 : kKind == kBF16 || kKind == kF16 ? 2 : 1;  // bytes
constexpr u32 kWords = kQuarter * kItem / 4;                                                 // of a quarter
// An element's bits [kShift + log2(kMask + 1) - 1 : kShift] are its exponent.
constexpr u32 kShift = kKind == kF32 || kWide ? 23 : kKind == kBF16 ? 7 : kKind == kF16 ? 10 : kKind == kF8E4M3 ? 3 : 2;
constexpr u32 kMask = kKind == kBF16 || kKind == kF32 ? 255 : kKind == kF8E4M3 ? 15 : 31;

// Bits of each plane of sign and mantissa, lowest bits first; 0: there is none.
constexpr u32 kWidth0 = kKind == kF8E4M3 ? 4 : kKind == kF8E5M2 ? 2 : 8;
constexpr u32 kWidth1 = kKind == kF32 ? 8 : kKind == kF16 ? 2 : kKind == kF8E5M2 ? 1 : 0;
constexpr u32 kWidth2 = kKind == kF32 ? 8 : kKind == kF16 ? 1 : 0;

__device__ __forceinline__ u64 pad64(u64 bytes) { return (bytes + 63) / 64 * 64; }

// One element, in the low bits.
__device__ __forceinline__ u32 load_element(const u8* address) {
  if constexpr (kItem == 4) return *reinterpret_cast<const u32*>(address);
  if constexpr (kItem == 2) return *reinterpret_cast<const u16*>(address);
  return *address;
}

// The rows of one block in device memory.
struct BlockRows {
  const u8* first;
  u64 stride;  // bytes from row to row
  u32 rows, cols;
  bool vectors;  // every row begins on a 16-byte boundary

  __device__ BlockRows(const u8* data, u64 row_bytes, u64 all_rows, u32 columns, u64 block) {
    const u64 left = all_rows - block * kBlockRows;
    first = data + block * kBlockRows * row_bytes;
    stride = row_bytes;
    rows = left < kBlockRows ? static_cast<u32>(left) : kBlockRows;
    cols = columns;
    vectors = (reinterpret_cast<u64>(data) | row_bytes) % 16 == 0;
  }

  __device__ u32 groups() const { return groups_in(rows, cols); }

  // A quarter's elements, in the order of positions. Where the matrix has none, behind the last group too: `fill`.
  // kAgain: they will be read again and should stay in the caches.
  template <bool kAgain>
  __device__ __forceinline__ void load(u32 group, u32 quarter, u32 fill, u32 (&words)[kWords]) const {
    const u32 tiles = cols / kGroup;
    if (group < tiles * rows) {
      // All blocks but the last have 16 rows, which saves the division.
      const u32 tile = rows == kBlockRows ? group / kBlockRows : group / rows, row = group - tile * rows;
      const u8* at = first + row * stride + static_cast<u64>(tile) * kGroup * kItem;
      if (vectors) {
        load_vectors<kAgain>(at, quarter, words);
      } else {
        load_elements(words, [&](u32 i) { return load_element(at + element(quarter, i) * kItem); });
      }
    } else {
      // Elements k, k + 1, ... of the run over the columns behind the last tile, row by row.
      const u32 edge = cols % kGroup, begin = (group - tiles * rows) * kGroup;
      u32 k = 0, row = 0, col = 0;
      load_elements(words, [&](u32 i) {
        if (i == 0 || element(quarter, i) != element(quarter, i - 1) + 1) {
          k = begin + element(quarter, i);
          row = edge != 0 ? k / edge : 0, col = k - row * edge;
        }
        const u32 word =
            k < rows * edge ? load_element(first + row * stride + (tiles * kGroup + col) * u64{kItem}) : fill;
        ++k;
        if (++col == edge) ++row, col = 0;
        return word;
      });
    }
  }

 private:
  // Index within its group of the element at position 16 * quarter + i.
  static __device__ __forceinline__ u32 element(u32 quarter, u32 i) {
    return kItem == 1 ? kQuarter * quarter + i : 32 * (i / 8) + 8 * quarter + i % 8;
  }

  // Wide kinds: 8 elements at 8 * quarter, 8 at 32 + 8 * quarter; others: 16 at 16 * quarter.
  template <bool kAgain>
  static __device__ __forceinline__ void load_vectors(const u8* group, u32 quarter, u32 (&words)[kWords]) {
#pragma unroll
    for (u32 v = 0; v < kWords / 4; ++v) {
      const u32 i = v * 16 / kItem;
      const uint4* const address = reinterpret_cast<const uint4*>(group + element(quarter, i) * kItem);
      const uint4 four = kAgain ? __ldg(address) : load_once(address);
      words[4 * v] = four.x, words[4 * v + 1] = four.y, words[4 * v + 2] = four.z, words[4 * v + 3] = four.w;
    }
  }

  template <class Load>
  static __device__ __forceinline__ void load_elements(u32 (&words)[kWords], Load load) {
    constexpr u32 kPerWord = 4 / kItem;
#pragma unroll
    for (u32 w = 0; w < kWords; ++w) {
      words[w] = 0;
#pragma unroll
      for (u32 i = 0; i < kPerWord; ++i) words[w] |= load(w * kPerWord + i) << (8 * kItem * i);
    }
  }
};

// Sixteen elements, a byte each: exponents, and what each plane of sign and mantissa holds.
struct Quarter {
  u32 exponents[4], plane0[4], plane1[4], plane2[4];

  __device__ __forceinline__ explicit Quarter(const u32 (&words)[kWords]) {
#pragma unroll
    for (u32 k = 0; k < 4; ++k) split(k, words + k * kItem);
  }

 private:
  __device__ __forceinline__ void split(u32 k, const u32* w) {
    if constexpr (kKind == kF8E4M3) {
      // [7] sign, [6:3] exponent, [2:0] mantissa
      exponents[k] = w[0] >> 3 & 0x0F0F0F0F;
      plane0[k] = (w[0] & 0x07070707) | (w[0] >> 4 & 0x08080808);
    } else if constexpr (kKind == kF8E5M2) {
      // [7] sign, [6:2] exponent, [1:0] mantissa
      exponents[k] = w[0] >> 2 & 0x1F1F1F1F;
      plane0[k] = w[0] & 0x03030303;
      plane1[k] = w[0] >> 7 & 0x01010101;
    } else if constexpr (kKind == kF16) {
      // high byte: [7] sign, [6:2] exponent, [1:0] mantissa[9:8]
      const u32 high = __byte_perm(w[0], w[1], 0x7531);
      exponents[k] = high >> 2 & 0x1F1F1F1F;
      plane0[k] = __byte_perm(w[0], w[1], 0x6420);
      plane1[k] = high & 0x03030303;
      plane2[k] = high >> 7 & 0x01010101;
    } else {
      // top bytes of BF16 and F32: high has [7] sign, [6:0] exponent[7:1]; low has [7] exponent[0], [6:0] mantissa
      u32 low, high;
      if constexpr (kItem == 2) {
        low = __byte_perm(w[0], w[1], 0x6420);
        high = __byte_perm(w[0], w[1], 0x7531);
      } else {
        const u32 upper01 = __byte_perm(w[0], w[1], 0x7362), upper23 = __byte_perm(w[2], w[3], 0x7362);
        low = __byte_perm(upper01, upper23, 0x5410);
        high = __byte_perm(upper01, upper23, 0x7632);
      }
      exponents[k] = (high << 1 & 0xFEFEFEFE) | (low >> 7 & 0x01010101);
      const u32 top = (high & 0x80808080) | (low & 0x7F7F7F7F);
      if constexpr (kKind == kF32) {
        const u32 lower01 = __byte_perm(w[0], w[1], 0x5140), lower23 = __byte_perm(w[2], w[3], 0x5140);
        plane0[k] = __byte_perm(lower01, lower23, 0x5410);
        plane1[k] = __byte_perm(lower01, lower23, 0x7632);
        plane2[k] = top;
      } else {
        plane0[k] = top;
      }
    }
  }
};

// The 2-bit plane of a group, of which lane q of its four holds quarter q, a value a byte: word q of four.
// Position p is at byte p mod 16, bits [2 * (p div 16) + 1 : 2 * (p div 16)]: quarter q gives those bits of every byte.
__device__ __forceinline__ u32 pack2(const u32 (&values)[4], u32 quarter) {
  const u32 shift = 2 * quarter;
  const bool upper = quarter & 2, odd = quarter & 1;
  const u32 keep0 = (upper ? values[2] : values[0]) << shift, keep1 = (upper ? values[3] : values[1]) << shift;
  const u32 give0 = (upper ? values[0] : values[2]) << shift, give1 = (upper ? values[1] : values[3]) << shift;
  const u32 pair0 = keep0 | __shfl_xor_sync(kAllLanes, give0, 2), pair1 = keep1 | __shfl_xor_sync(kAllLanes, give1, 2);
  return (odd ? pair1 : pair0) | __shfl_xor_sync(kAllLanes, odd ? pair0 : pair1, 1);
}

// Stores a quarter of a plane of sign and mantissa, by all lanes of a warp, those with `live` to memory.
template <u32 kPlaneWidth>
__device__ __forceinline__ void store_plane(u8* plane, u64 group, u32 quarter, const u32 (&values)[4], bool live) {
  u8* const out = plane + group * (8 * kPlaneWidth);
  if constexpr (kPlaneWidth == 8) {
    if (live) {
      store_once(reinterpret_cast<uint4*>(out + 16 * quarter), make_uint4(values[0], values[1], values[2], values[3]));
    }
  } else if constexpr (kPlaneWidth == 4) {
    // Position p is at byte p mod 32, bits [4 * (p div 32) + 3 : 4 * (p div 32)]: quarters q and q + 2 share bytes.
    u32 words[4];
#pragma unroll
    for (u32 k = 0; k < 4; ++k) {
      const u32 other = __shfl_xor_sync(kAllLanes, values[k], 2);
      words[k] = values[k] | other << 4;
    }
    if (live && quarter < 2) {
      store_once(reinterpret_cast<uint4*>(out + 16 * quarter), make_uint4(words[0], words[1], words[2], words[3]));
    }
  } else if constexpr (kPlaneWidth == 2) {
    const u32 word = pack2(values, quarter);
    if (live) store_once(reinterpret_cast<u32*>(out) + quarter, word);
  } else if constexpr (kPlaneWidth == 1) {
    // Position p is at byte p mod 8, bit p div 8: quarter q gives bits 2q (its first eight) and 2q + 1.
    u32 word0 = (values[0] | values[2] << 1) << (2 * quarter), word1 = (values[1] | values[3] << 1) << (2 * quarter);
#pragma unroll
    for (u32 step = 1; step < 4; step *= 2) {
      word0 |= __shfl_xor_sync(kAllLanes, word0, step);
      word1 |= __shfl_xor_sync(kAllLanes, word1, step);
    }
    if (live && quarter < 2) store_once(reinterpret_cast<u32*>(out) + quarter, quarter ? word1 : word0);
  }
}
