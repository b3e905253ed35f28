// Quantizes the keys and values that have left a cache's exact window and packs them. Arithmetic is IEEE FP32 to
// nearest, in the order of bitforbit/kv/layout.py, whose bytes these are.
//
// Blocks of `key_blocks` and more make values, the others keys; blockIdx.y is row and head. Where there is nothing to
// do a block ends at once: how many tokens a row has is known on the device alone.
//
// BITFORBIT_DTYPE: that of the model: 0 BF16, 1 FP16, 2 FP32. See kv.cuh for the others.
#include "kv.cuh"

constexpr u32 kThreads = 128;
constexpr u32 kBf16 = 0, kF16 = 1, kF32 = 2, kDtype = BITFORBIT_DTYPE;

template <u32 kKind>
struct Stored {
  using Element = u16;
};
template <>
struct Stored<kF32> {
  using Element = float;
};
using Element = Stored<kDtype>::Element;

__device__ __forceinline__ float to_float(u16 word) {
  if constexpr (kDtype == kBf16) return __uint_as_float(static_cast<u32>(word) << 16);
  // 2^112 moves the exponent from FP16's place to FP32's, for subnormals too; [14:10] all ones: NaN or infinity.
  const u32 sign = static_cast<u32>(word & 0x8000) << 16;
  const float size = __uint_as_float(static_cast<u32>(word & 0x7FFF) << 13) * __uint_as_float(0x77800000);
  const u32 bits = __float_as_uint(size) | ((word & 0x7C00) == 0x7C00 ? 0x7F800000u : 0);
  return __uint_as_float(sign | bits);
}
__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7F800000) != 0x7F800000; }

struct Four {
  float x[4];
};

// Four elements, on a multiple of their size.
__device__ __forceinline__ Four load_four(const Element* gmem) {
  if constexpr (kDtype == kF32) {
    const float4 raw = *reinterpret_cast<const float4*>(gmem);
    return {raw.x, raw.y, raw.z, raw.w};
  } else {
    const uint2 raw = *reinterpret_cast<const uint2*>(gmem);
    return {to_float(static_cast<u16>(raw.x)), to_float(static_cast<u16>(raw.x >> 16)),
            to_float(static_cast<u16>(raw.y)), to_float(static_cast<u16>(raw.y >> 16))};
  }
}

// Least and largest element of a group, and whether all are finite.
struct Extremes {
  float lo = __uint_as_float(0x7F800000), hi = __uint_as_float(0xFF800000);
  bool finite = true;

  __device__ __forceinline__ void add(float x) {
    lo = fminf(lo, x);
    hi = fmaxf(hi, x);
    finite = finite && is_finite(x);
  }
};

struct Quantizer {
  float zero, inverse;  // of the scale; 0: all codes are 0
  u16 zero_word, scale_word;

  template <u32 kBits>
  __device__ __forceinline__ u32 code(float x) const {
    constexpr float kLast = (1u << kBits) - 1;
    if (inverse == 0) return 0;
    return static_cast<u32>(fminf(fmaxf(rintf((x - zero) * inverse), 0.0f), kLast));
  }
};

// FP16 of a value that is one.
__device__ __forceinline__ u16 exact_f16(float value) {
  const u32 bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  const u32 word = size >= 0x38800000 ? (size >> 13) - (112u << 10)                             // at least 2^-14
                                      : static_cast<u32>(__uint_as_float(size) * 16777216.0f);  // units of 2^-24
  return static_cast<u16>(sign | word);
}

template <u32 kBits>
__device__ __forceinline__ Quantizer quantizer(const Extremes& found) {
  constexpr float kLast = (1u << kBits) - 1;
  if (!found.finite) {
    constexpr u16 kNan = kDtype == kF16 ? 0x7E00 : 0x7FC0;
    return {0, 0, kNan, kNan};
  }
  float zero = found.lo + 0.0f;  // no -0: which of two zeros is the least is nobody's to say
  if constexpr (kDtype == kF32) {
    const u32 bits = __float_as_uint(zero), below = bits & 0xFFFF0000;
    // Down: away from 0 if it is negative; not beyond the least finite one.
    zero = __uint_as_float(bits != below && bits >> 31 != 0 ? min(below + 0x10000, 0xFF7F0000u) : below);
  }
  const u16 zero_word = kDtype == kF16 ? exact_f16(zero) : static_cast<u16>(__float_as_uint(zero) >> 16);
  if (found.hi <= zero) return {zero, 0, zero_word, 0};
  const float span = found.hi - zero;
  const float range = is_finite(span) ? span / kLast : found.hi / kLast - zero / kLast;
  float scale;
  if constexpr (kDtype == kF16) {
    scale = range < 0x1p-14f ? ceilf(range * 0x1p24f) * 0x1p-24f
                             : __uint_as_float((__float_as_uint(range) + 0x1FFF) & ~0x1FFFu);
  } else {
    scale = fmaxf(__uint_as_float((__float_as_uint(range) + 0xFFFF) & ~0xFFFFu), 0x1p-126f);
  }
  const u16 scale_word = kDtype == kF16 ? exact_f16(scale) : static_cast<u16>(__float_as_uint(scale) >> 16);
  return {zero, 1.0f / scale, zero_word, scale_word};
}

// Where a row's and head's exact tokens lie: in the window, or those of the call beside it.
struct Source {
  const Element* gmem_window;
  const Element* gmem_pending;  // 0: there are none; else of slot `old_slots`
  u64 pending_stride;
  u32 capacity, old_slots;

  __device__ __forceinline__ const Element* at(u32 slot) const {
    if (gmem_pending != nullptr && slot >= old_slots) return gmem_pending + (slot - old_slots) * pending_stride;
    return gmem_window + slot % capacity * kHead;
  }
};

// Four channels of a group of keys: [3:0] of a word's place in its tile are the token's.
__device__ __forceinline__ void flush_keys(const Source& source, u32 slot, u8* gmem_record, u32 group, u32 quad,
                                           u32* gmem_bad) {
  constexpr u32 kWordTokens = 8 / kKeyBits, kQuadWords = kTileTokens / kWordTokens;
  Extremes found[4];
  for (u32 i = 0; i < kGroup; ++i) {
    const Four x = load_four(source.at(slot + i) + 4 * quad);
#pragma unroll
    for (u32 m = 0; m < 4; ++m) found[m].add(x.x[m]);
  }
  Quantizer quantize[4];
  u16* gmem_params = reinterpret_cast<u16*>(gmem_record + kKeyParams + group * kKeyGroupBytes) + 4 * quad;
#pragma unroll
  for (u32 m = 0; m < 4; ++m) {
    quantize[m] = quantizer<kKeyBits>(found[m]);
    gmem_params[m] = quantize[m].scale_word;
    gmem_params[kHead + m] = quantize[m].zero_word;
    if (!found[m].finite) atomicAdd(gmem_bad, 1);
  }
  u32* gmem_words = reinterpret_cast<u32*>(gmem_record + group * (kGroup / kTileTokens) * kKeyTileBytes);
  for (u32 i = 0; i < kGroup; i += kWordTokens) {
    u32 word = 0;
#pragma unroll
    for (u32 j = 0; j < kWordTokens; ++j) {
      const Four x = load_four(source.at(slot + i + j) + 4 * quad);
#pragma unroll
      for (u32 m = 0; m < 4; ++m) {
        word |= quantize[m].code<kKeyBits>(x.x[m]) << (16 * (m % 2) + kKeyBits * (2 * j + m / 2));
      }
    }
    gmem_words[i / kTileTokens * (kKeyTileBytes / 4) + quad * kQuadWords + i % kTileTokens / kWordTokens] = word;
  }
}

// Tokens [first, end) of a tile of values; `slot` is that of the tile's token 0.
__device__ __forceinline__ void flush_values(const Source& source, u32 slot, u8* gmem_record, u32 tile, u32 first,
                                             u32 end, u32* gmem_bad) {
  SHARED(const Element*, smem_row, kTileTokens);
  SHARED(float, smem_zero, kTileTokens* kValueGroups);
  SHARED(float, smem_inverse, kTileTokens* kValueGroups);
  const u32 tokens = end - first;
  u16* gmem_params = reinterpret_cast<u16*>(gmem_record + kValueParams + tile * kValueParamsTileBytes);
  if (threadIdx.x < tokens) smem_row[first + threadIdx.x] = source.at(slot + first + threadIdx.x);
  __syncthreads();
  for (u32 i = threadIdx.x; i < tokens * kValueGroups; i += kThreads) {
    const u32 token = first + i / kValueGroups, group = i % kValueGroups;
    Extremes found;
    for (u32 c = 0; c < kValueGroup; c += 4) {
      const Four x = load_four(smem_row[token] + group * kValueGroup + c);
#pragma unroll
      for (u32 m = 0; m < 4; ++m) found.add(x.x[m]);
    }
    const Quantizer quantize = quantizer<kValueBits>(found);
    gmem_params[group * 2 * kTileTokens + token] = quantize.scale_word;
    gmem_params[(group * 2 + 1) * kTileTokens + token] = quantize.zero_word;
    smem_zero[token * kValueGroups + group] = quantize.zero;
    smem_inverse[token * kValueGroups + group] = quantize.inverse;
    if (!found.finite) atomicAdd(gmem_bad, 1);
  }
  __syncthreads();

  // A word has tokens 8t + j and, 16 bits above, 8t + 4 + j: all of j = 0-3 for one channel (4 bits) or two (2 bits),
  // or two of them (8 bits).
  constexpr u32 kWordChannels = kValueBits == 2 ? 2 : 1, kWordTokens = kValueBits == 8 ? 2 : 4;
  constexpr u32 kRowWords = kHead / kWordChannels, kWords = kTileTokens * kHead * kValueBits / 32;
  u32* gmem_words = reinterpret_cast<u32*>(gmem_record + kValueCodes + tile * kValueTileBytes);
  for (u32 w = threadIdx.x; w < kWords; w += kThreads) {
    const u32 row = w / kRowWords, channel = w % kRowWords * kWordChannels;
    const u32 token = kValueBits == 8 ? row / 2 * 8 + row % 2 * 2 : row * 8;  // of j = 0 in this word
    u32 word = 0, written = 0;
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
#pragma unroll
      for (u32 j = 0; j < kWordTokens; ++j) {
        const u32 i = token + 4 * half + j;
        if (i < first || i >= end) continue;
#pragma unroll
        for (u32 c = 0; c < kWordChannels; ++c) {
          const u32 shift = 16 * half + kValueBits * (4 * c + j), at = i * kValueGroups + (channel + c) / kValueGroup;
          const Quantizer quantize = {smem_zero[at], smem_inverse[at], 0, 0};
          word |= quantize.code<kValueBits>(to_float(smem_row[i][channel + c])) << shift;
          written |= ((1u << kValueBits) - 1) << shift;
        }
      }
    }
    if (written == 0) continue;
    gmem_words[w] = written == ~0u ? word : (gmem_words[w] & ~written) | word;
  }
}

// Slots [old_slots, new_slots) are new; with a counter, what it says plays the part of old_slots, with as many new.
// Strides are those of rows, heads, tokens, in elements. `gmem_bad` counts groups with a NaN or an infinity.
extern "C" __global__ void __launch_bounds__(kThreads)
    kv_flush(u8* const* gmem_segments, const Element* gmem_window_k, const Element* gmem_window_v,
             const i32* gmem_start, u32 heads, u32 residual, u32 sink, u32 capacity, u32 old_slots, u32 new_slots,
             const i32* gmem_counter, const Element* gmem_pending_k, const Element* gmem_pending_v, u64 k_row,
             u64 k_head, u64 k_token, u64 v_row, u64 v_head, u64 v_token, u32* gmem_bad, u32 key_blocks) {
  const u32 row = blockIdx.y / heads, head = blockIdx.y % heads;
  if (gmem_counter != nullptr) {
    new_slots = new_slots - old_slots + static_cast<u32>(*gmem_counter);
    old_slots = static_cast<u32>(*gmem_counter);
  }
  const u32 start = static_cast<u32>(gmem_start[row]);
  const u32 old_tokens = row_tokens(old_slots, start), new_tokens = row_tokens(new_slots, start);
  const u64 window = static_cast<u64>(blockIdx.y) * capacity * kHead;

  if (blockIdx.x < key_blocks) {
    const u32 begin = keys_quantized(old_tokens, sink, residual), end = keys_quantized(new_tokens, sink, residual);
    const u32 thread = blockIdx.x * kThreads + threadIdx.x, quad = thread % (kHead / 4);
    const u32 token = begin + thread / (kHead / 4) * kGroup;
    if (token >= end) return;
    const Source source = {gmem_window_k + window,
                           gmem_pending_k == nullptr ? nullptr : gmem_pending_k + row * k_row + head * k_head, k_token,
                           capacity, old_slots};
    flush_keys(source, start + sink + token, record_of(gmem_segments, token / kSegmentTokens, blockIdx.y),
               token % kSegmentTokens / kGroup, quad, gmem_bad);
    return;
  }
  const u32 begin = values_quantized(old_tokens, sink, residual), end = values_quantized(new_tokens, sink, residual);
  const u32 tile_begin = (begin / kTileTokens + blockIdx.x - key_blocks) * kTileTokens;
  if (tile_begin >= end) return;
  const Source source = {gmem_window_v + window,
                         gmem_pending_v == nullptr ? nullptr : gmem_pending_v + row * v_row + head * v_head, v_token,
                         capacity, old_slots};
  flush_values(source, start + sink + tile_begin, record_of(gmem_segments, tile_begin / kSegmentTokens, blockIdx.y),
               tile_begin % kSegmentTokens / kTileTokens, max(begin, tile_begin) - tile_begin,
               min(end - tile_begin, kTileTokens), gmem_bad);
}
