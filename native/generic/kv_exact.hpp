// The parts of attention that read no codes: exact keys and values, and probabilities from scores. Included by
// isa/*/kv.cpp: plain loops, vectorized by the compiler.
#pragma once

#include "generic/kv_floats.hpp"

namespace bitforbit {
namespace {

// One register of the instruction set that the file is compiled for.
#if defined(__AVX512F__)
inline constexpr std::size_t kLaneCount = 16;
#elif defined(__AVX2__)
inline constexpr std::size_t kLaneCount = 8;
#else
inline constexpr std::size_t kLaneCount = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLaneCount)));
using LaneWords = std::int32_t __attribute__((vector_size(4 * kLaneCount)));

inline __attribute__((always_inline)) void load_lanes(const float* p, Lanes& x) { __builtin_memcpy(&x, p, sizeof x); }
inline __attribute__((always_inline)) void store_lanes(float* p, const Lanes& x) { __builtin_memcpy(p, &x, sizeof x); }
inline __attribute__((always_inline)) void fill_lanes(float value, Lanes& x) { x = Lanes{} + value; }

// Lanes l and l + half of them, and so on.
inline float add_lanes(const Lanes& x) {
  float lanes[kLaneCount];
  store_lanes(lanes, x);
#pragma GCC unroll 4
  for (std::size_t step = kLaneCount / 2; step; step /= 2) {
#pragma GCC unroll 8
    for (std::size_t l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

inline constexpr std::size_t kExactBlock = 4;  // tokens that are multiplied together

// Rows first to first + kExactBlock - 1 as FP32; missing ones are zeros.
inline std::size_t widen_rows(const KvRecord& r, const std::uint8_t* const* rows, std::size_t first, std::size_t count,
                              float (*x)[kKvMostHead]) {
  const std::size_t n = count - first < kExactBlock ? count - first : kExactBlock;
  for (std::size_t i = 0; i < n; ++i) widen(r.dtype, rows[first + i], r.head_dim, x[i]);
  for (std::size_t i = n; i < kExactBlock; ++i) __builtin_memset(x[i], 0, 4 * r.head_dim);
  return n;
}

inline void score_exact(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const KvQueries& q,
                        float* scores) {
  float keys[kExactBlock][kKvMostHead];
  for (std::size_t i = 0; i < count; i += kExactBlock) {
    const std::size_t n = widen_rows(r, rows, i, count, keys);
    for (std::size_t m = 0; m < q.count; ++m) {
      const float* query = q.q + m * r.head_dim;
      Lanes sum0{}, sum1{}, sum2{}, sum3{};
      for (std::size_t c = 0; c < r.head_dim; c += kLaneCount) {
        Lanes x, k0, k1, k2, k3;
        load_lanes(query + c, x);
        load_lanes(keys[0] + c, k0), load_lanes(keys[1] + c, k1);
        load_lanes(keys[2] + c, k2), load_lanes(keys[3] + c, k3);
        sum0 += x * k0, sum1 += x * k1, sum2 += x * k2, sum3 += x * k3;
      }
      const float dots[kExactBlock] = {add_lanes(sum0), add_lanes(sum1), add_lanes(sum2), add_lanes(sum3)};
      __builtin_memcpy(scores + m * kKvScores + i, dots, 4 * n);
    }
  }
}

inline void sum_exact(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const float* p,
                      const KvQueries& q, float* out) {
  float values[kExactBlock][kKvMostHead];
  for (std::size_t i = 0; i < count; i += kExactBlock) {
    const std::size_t n = widen_rows(r, rows, i, count, values);
    for (std::size_t m = 0; m < q.count; ++m) {
      float weights[kExactBlock] = {};
      __builtin_memcpy(weights, p + m * kKvScores + i, 4 * n);
      float* sum = out + m * r.head_dim;
      for (std::size_t c = 0; c < r.head_dim; c += kLaneCount) {
        Lanes x, v0, v1, v2, v3;
        load_lanes(sum + c, x);
        load_lanes(values[0] + c, v0), load_lanes(values[1] + c, v1);
        load_lanes(values[2] + c, v2), load_lanes(values[3] + c, v3);
        x += (weights[0] * v0 + weights[1] * v1) + (weights[2] * v2 + weights[3] * v3);
        store_lanes(sum + c, x);
      }
    }
  }
}

// e^x for x <= 0 within 2 units in the last place, 0 where that is no normal number; NaN stays. x = n ln 2 + r, and
// Taylor's series of e^r to r^7: |r| <= 0.35 leaves 5e-9.
inline __attribute__((always_inline)) void exp_negative(const Lanes& x, Lanes& out) {
  constexpr float kLeast = -87.33654f;  // ln 2^-126
  constexpr float kRound = 0x1.8p23f;   // adding it leaves an integer in the low bits
  Lanes least;
  fill_lanes(kLeast, least);
  const Lanes bounded = x > least ? x : least;
  const Lanes shifted = bounded * 0x1.715476p0f + kRound;
  const Lanes n = shifted - kRound;
  const Lanes rest = (bounded - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln 2 in two parts, the first of 12 bits
  Lanes y = rest * (1.0f / 5040) + 1.0f / 720;
  y = y * rest + 1.0f / 120;
  y = y * rest + 1.0f / 24;
  y = y * rest + 1.0f / 6;
  y = y * rest + 0.5f;
  y = y * (rest * rest) + rest + 1.0f;
  const LaneWords power = ((LaneWords)shifted + (127 - 0x4b400000)) << 23;
  y = x < least ? Lanes{} : y * (Lanes)power;
  out = x != x ? x : y;
}

// tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|).
inline __attribute__((always_inline)) void tanh_lanes(const Lanes& x, Lanes& out) {
  constexpr std::int32_t kMagnitude = 0x7fffffff;
  const Lanes minus = -2.0f * (Lanes)((LaneWords)x & kMagnitude);
  Lanes e;
  exp_negative(minus, e);
  out = (Lanes)((LaneWords)((1.0f - e) / (1.0f + e)) | ((LaneWords)x & ~kMagnitude));
}

inline void softmax(const KvSoftmax& s, const std::uint8_t* mask, float* scores, float* max, float* sum) {
  const std::size_t end = (s.count + kKvTile - 1) / kKvTile * kKvTile;
  for (std::size_t i = s.count; i < end; ++i) scores[i] = 0.0f;
  Lanes nothing, most, total{};
  fill_lanes(-__builtin_inff(), nothing);
  most = nothing;
  LaneWords index;
  for (std::size_t l = 0; l < kLaneCount; ++l) index[l] = static_cast<std::int32_t>(l);
  const auto count = static_cast<std::int32_t>(s.count);
  for (std::size_t i = 0; i < end; i += kLaneCount, index += static_cast<std::int32_t>(kLaneCount)) {
    Lanes x;
    load_lanes(scores + i, x);
    x *= s.scaling;
    if (s.softcap != 0.0f) {
      Lanes capped;
      tanh_lanes(x / s.softcap, capped);
      x = s.softcap * capped;
    }
    x = index < count ? x : nothing;
    if (mask) {
      std::int32_t bytes[kLaneCount];
      for (std::size_t l = 0; l < kLaneCount; ++l) bytes[l] = i + l < s.count ? mask[i + l] : 0;
      LaneWords seen;
      __builtin_memcpy(&seen, bytes, sizeof seen);
      x = seen != 0 ? x : nothing;
    }
    most = x > most ? x : most;
    store_lanes(scores + i, x);
  }
  float lanes[kLaneCount];
  store_lanes(lanes, most);
  *max = lanes[0];
  for (std::size_t l = 1; l < kLaneCount; ++l) *max = lanes[l] > *max ? lanes[l] : *max;
  // With nothing seen every difference would be a NaN.
  const float base = *max == -__builtin_inff() ? 0.0f : *max;
  for (std::size_t i = 0; i < end; i += kLaneCount) {
    Lanes x;
    load_lanes(scores + i, x);
    exp_negative(x - base, x);
    store_lanes(scores + i, x);
    total += x;
  }
  *sum = add_lanes(total);
}

}  // namespace
}  // namespace bitforbit
