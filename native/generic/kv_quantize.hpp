// Quantizing groups of keys and values into a record, as bitforbit.kv.layout defines it bit for bit. Included by
// isa/*/kv.cpp: plain loops, vectorized by the compiler; every instruction set gives the same bytes.
#pragma once

#include "generic/kv_floats.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kMinMaxLanes = 16;  // of a group of values

struct KvParams {
  std::uint16_t scale_bits, zero_bits;
  float zero, inverse;  // of a group that is not finite: 0, 0
};

inline bool is_finite(float x) { return (word_of(x) & 0x7f800000u) != 0x7f800000u; }

// Down to bfloat16, but not to -infinity.
inline std::uint16_t bf16_down(float x) {
  const std::uint32_t word = word_of(x);
  const std::uint32_t down = (word >> 16) + (word >> 31 && (word & 0xffffu));
  return static_cast<std::uint16_t>(down == 0xff80u ? 0xff7fu : down);
}

// Positive x up to bfloat16, at least the least normal one.
inline std::uint16_t bf16_up(float x) {
  const std::uint32_t up = (word_of(x) + 0xffffu) >> 16;
  return static_cast<std::uint16_t>(up < 0x0080u ? 0x0080u : up);
}

// x is a float16.
inline std::uint16_t f16_bits(float x) {
  const std::uint32_t word = word_of(x), magnitude = word & 0x7fffffffu, sign = word >> 16 & 0x8000u;
  if (magnitude < 0x38800000u)
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(float_of(magnitude) * 0x1p24f));
  return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

// Positive x up to float16.
inline std::uint16_t f16_up(float x) {
  if (x >= 0x1p-14f) return static_cast<std::uint16_t>((word_of(x) - 0x38000000u + 0x1fffu) >> 13);
  const float units = x * 0x1p24f;  // of 2^-24
  const auto whole = static_cast<std::uint32_t>(units);
  return static_cast<std::uint16_t>(whole + (static_cast<float>(whole) < units));
}

inline KvParams make_params(bool f16, float lo, float hi, bool finite, float n) {
  if (!finite) {
    const auto nan = static_cast<std::uint16_t>(f16 ? 0x7e00 : 0x7fc0);
    return {nan, nan, 0.0f, 0.0f};
  }
  lo += 0.0f;  // -0 becomes +0
  KvParams p;
  p.zero_bits = f16 ? f16_bits(lo) : bf16_down(lo);
  p.zero = f16 ? f16_value(p.zero_bits) : bf16_value(p.zero_bits);
  if (hi <= p.zero) {
    p.scale_bits = 0, p.inverse = 0.0f;
    return p;
  }
  float range = (hi - p.zero) / n;
  if (!is_finite(range)) range = hi / n - p.zero / n;
  p.scale_bits = f16 ? f16_up(range) : bf16_up(range);
  p.inverse = 1.0f / (f16 ? f16_value(p.scale_bits) : bf16_value(p.scale_bits));
  return p;
}

inline std::uint8_t code_of(float x, float zero, float inverse, float n) {
  float v = (x - zero) * inverse;
  v = v > 0.0f ? v : 0.0f;  // a NaN too
  v = v < n ? v : n;
  return static_cast<std::uint8_t>(word_of(v + 0x1p23f));  // to nearest even, in the low bits of the mantissa
}

// Codes [32][D] of a tile of keys to words [D/4][32/E]; of a byte quad of channels m = 0 to 3 the channels 0, 2 go to
// the lower half of a word, 1, 3 to the upper one.
template <int kBits>
void pack_keys(const std::uint8_t* codes, std::size_t head_dim, std::uint8_t* out) {
  constexpr std::size_t kPerWord = 8 / kBits, kWords = kKvTile / kPerWord;
  const std::size_t quads = head_dim / 4;
  std::uint32_t words[kKvMostHead / 4];
  for (std::size_t w = 0; w < kWords; ++w) {
    for (std::size_t e = 0; e < kPerWord; ++e) {
      const std::uint8_t* row = codes + (w * kPerWord + e) * head_dim;
      const int shift = 2 * kBits * static_cast<int>(e);
      for (std::size_t i = 0; i < quads; ++i) {
        std::uint32_t quad;  // [7:0] channel 0, [15:8] 1, [23:16] 2, [31:24] 3
        __builtin_memcpy(&quad, row + 4 * i, 4);
        const std::uint32_t word =
            (quad & 0xffu) | (quad >> 16 & 0xffu) << kBits | (quad >> 8 & 0xffu) << 16 | quad >> 24 << (16 + kBits);
        words[i] = (e ? words[i] : 0) | word << shift;
      }
    }
    for (std::size_t i = 0; i < quads; ++i) __builtin_memcpy(out + 4 * (i * kWords + w), &words[i], 4);
  }
}

template <KvDtype kDtype, int kBits>
std::size_t quantize_keys(const KvRecord& r, const std::uint8_t* const* rows, std::size_t index, std::uint8_t* record) {
  constexpr bool kF16 = kDtype == KvDtype::kF16;
  constexpr float kMost = (1 << kBits) - 1;
  const std::size_t channels = r.head_dim;
  float lo[kKvMostHead], hi[kKvMostHead], zero[kKvMostHead], inverse[kKvMostHead];
  std::uint32_t wrong[kKvMostHead];
  widen<kDtype>(rows[0], channels, lo);
  for (std::size_t c = 0; c < channels; ++c) hi[c] = lo[c], wrong[c] = 0;
  for (std::size_t i = 0; i < r.group; ++i) {
    for (std::size_t c = 0; c < channels; ++c) {
      const float x = load_value<kDtype>(rows[i], c);
      lo[c] = x < lo[c] ? x : lo[c];
      hi[c] = x > hi[c] ? x : hi[c];
      wrong[c] |= (word_of(x) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
    }
  }
  std::size_t bad = 0;
  std::uint8_t* params = record + r.key_params + index * r.key_group;
  for (std::size_t c = 0; c < channels; ++c) {
    const KvParams p = make_params(kF16, lo[c], hi[c], !wrong[c], kMost);
    __builtin_memcpy(params + 2 * c, &p.scale_bits, 2);
    __builtin_memcpy(params + 2 * (channels + c), &p.zero_bits, 2);
    zero[c] = p.zero, inverse[c] = p.inverse;
    bad += wrong[c];
  }
  std::uint8_t codes[kKvTile * kKvMostHead];
  for (std::size_t tile = 0; tile < r.group / kKvTile; ++tile) {
    for (std::size_t i = 0; i < kKvTile; ++i) {
      const std::uint8_t* row = rows[tile * kKvTile + i];
      for (std::size_t c = 0; c < channels; ++c) {
        codes[i * channels + c] = code_of(load_value<kDtype>(row, c), zero[c], inverse[c], kMost);
      }
    }
    pack_keys<kBits>(codes, channels, record + (index * r.group / kKvTile + tile) * r.key_tile);
  }
  return bad;
}

// Codes [D] of token i of a tile into the tile's words, which hold other tokens too.
template <int kBits>
void put_values(const std::uint8_t* codes, std::size_t head_dim, std::size_t i, std::uint8_t* tile) {
  const std::size_t t = i / 8, half = i / 4 % 2, j = i % 4;
  if constexpr (kBits == 2) {  // [7:0] channel 2k, [15:8] channel 2k + 1
    const int shift = static_cast<int>(16 * half + 2 * j);
    std::uint8_t* at = tile + 4 * t * (head_dim / 2);
    for (std::size_t k = 0; k < head_dim / 2; ++k) {
      std::uint32_t word;
      __builtin_memcpy(&word, at + 4 * k, 4);
      word = (word & ~(0x0303u << shift)) | static_cast<std::uint32_t>(load16(codes + 2 * k)) << shift;
      __builtin_memcpy(at + 4 * k, &word, 4);
    }
  } else {
    const int shift = static_cast<int>(kBits == 4 ? 16 * half + 4 * j : 16 * half + 8 * (j % 2));
    std::uint8_t* at = tile + 4 * head_dim * (kBits == 4 ? t : 2 * t + j / 2);
    constexpr std::uint32_t kMask = (1u << kBits) - 1;
    for (std::size_t c = 0; c < head_dim; ++c) {
      std::uint32_t word;
      __builtin_memcpy(&word, at + 4 * c, 4);
      word = (word & ~(kMask << shift)) | static_cast<std::uint32_t>(codes[c]) << shift;
      __builtin_memcpy(at + 4 * c, &word, 4);
    }
  }
}

template <KvDtype kDtype, int kBits>
std::size_t quantize_values(const KvRecord& r, const std::uint8_t* const* rows, std::size_t first, std::size_t count,
                            std::uint8_t* record) {
  constexpr bool kF16 = kDtype == KvDtype::kF16;
  constexpr float kMost = (1 << kBits) - 1;
  const std::size_t tile = first / kKvTile;
  std::uint8_t* params = record + r.value_params + tile * r.value_params_tile;
  std::uint8_t* words = record + r.value_codes + tile * r.value_tile;
  float x[kKvMostGroup];
  std::uint8_t codes[kKvMostHead];
  std::size_t bad = 0;
  for (std::size_t k = 0; k < count; ++k) {
    const std::size_t i = (first + k) % kKvTile;
    for (std::size_t g = 0; g < r.head_dim / r.v_group; ++g) {
      widen<kDtype>(rows[k] + g * r.v_group * r.item, r.v_group, x);
      float lo[kMinMaxLanes], hi[kMinMaxLanes];
      std::uint32_t wrong[kMinMaxLanes];
      for (std::size_t l = 0; l < kMinMaxLanes; ++l) lo[l] = hi[l] = x[l], wrong[l] = 0;
      for (std::size_t c = 0; c < r.v_group; c += kMinMaxLanes) {
        for (std::size_t l = 0; l < kMinMaxLanes; ++l) {
          lo[l] = x[c + l] < lo[l] ? x[c + l] : lo[l];
          hi[l] = x[c + l] > hi[l] ? x[c + l] : hi[l];
          wrong[l] |= (word_of(x[c + l]) & 0x7f800000u) == 0x7f800000u ? 1u : 0u;
        }
      }
      for (std::size_t l = 1; l < kMinMaxLanes; ++l) {
        lo[0] = lo[l] < lo[0] ? lo[l] : lo[0];
        hi[0] = hi[l] > hi[0] ? hi[l] : hi[0];
        wrong[0] |= wrong[l];
      }
      const KvParams p = make_params(kF16, lo[0], hi[0], !wrong[0], kMost);
      __builtin_memcpy(params + 2 * (2 * g * kKvTile + i), &p.scale_bits, 2);
      __builtin_memcpy(params + 2 * ((2 * g + 1) * kKvTile + i), &p.zero_bits, 2);
      bad += wrong[0];
      for (std::size_t c = 0; c < r.v_group; ++c) codes[g * r.v_group + c] = code_of(x[c], p.zero, p.inverse, kMost);
    }
    put_values<kBits>(codes, r.head_dim, i, words);
  }
  return bad;
}

template <KvDtype kDtype>
std::size_t quantize_keys_of(const KvRecord& r, const std::uint8_t* const* rows, std::size_t index,
                             std::uint8_t* record) {
  switch (r.k_bits) {
    case 2: return quantize_keys<kDtype, 2>(r, rows, index, record);
    case 4: return quantize_keys<kDtype, 4>(r, rows, index, record);
    default: return quantize_keys<kDtype, 8>(r, rows, index, record);
  }
}

inline std::size_t quantize_keys(const KvRecord& r, const std::uint8_t* const* rows, std::size_t index,
                                 std::uint8_t* record) {
  switch (r.dtype) {
    case KvDtype::kBF16: return quantize_keys_of<KvDtype::kBF16>(r, rows, index, record);
    case KvDtype::kF16: return quantize_keys_of<KvDtype::kF16>(r, rows, index, record);
    default: return quantize_keys_of<KvDtype::kF32>(r, rows, index, record);
  }
}

template <KvDtype kDtype>
std::size_t quantize_values_of(const KvRecord& r, const std::uint8_t* const* rows, std::size_t first, std::size_t count,
                               std::uint8_t* record) {
  switch (r.v_bits) {
    case 2: return quantize_values<kDtype, 2>(r, rows, first, count, record);
    case 4: return quantize_values<kDtype, 4>(r, rows, first, count, record);
    default: return quantize_values<kDtype, 8>(r, rows, first, count, record);
  }
}

inline std::size_t quantize_values(const KvRecord& r, const std::uint8_t* const* rows, std::size_t first,
                                   std::size_t count, std::uint8_t* record) {
  switch (r.dtype) {
    case KvDtype::kBF16: return quantize_values_of<KvDtype::kBF16>(r, rows, first, count, record);
    case KvDtype::kF16: return quantize_values_of<KvDtype::kF16>(r, rows, first, count, record);
    default: return quantize_values_of<KvDtype::kF32>(r, rows, first, count, record);
  }
}

}  // namespace
}  // namespace bitforbit
