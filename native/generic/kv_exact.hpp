// The parts of attention that read no codes: exact keys and values, and probabilities from scores. Included by
// isa/*/kv.cpp: plain loops, vectorized by the compiler.
#pragma once

#include "generic/kv_floats.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kSumLanes = 16;

// Lanes l and l + 8, then 4, 2, 1.
inline float add_kv_lanes(float* lanes) {
  for (std::size_t step = kSumLanes / 2; step; step /= 2) {
    for (std::size_t l = 0; l < step; ++l) lanes[l] += lanes[l + step];
  }
  return lanes[0];
}

inline void score_exact(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const KvQueries& q,
                        float* scores) {
  float key[kKvMostHead];
  for (std::size_t i = 0; i < count; ++i) {
    widen(r.dtype, rows[i], r.head_dim, key);
    for (std::size_t m = 0; m < q.count; ++m) {
      const float* query = q.q + m * r.head_dim;
      float lanes[kSumLanes] = {};
      for (std::size_t c = 0; c < r.head_dim; c += kSumLanes) {
        for (std::size_t l = 0; l < kSumLanes; ++l) lanes[l] += query[c + l] * key[c + l];
      }
      scores[m * kKvScores + i] = add_kv_lanes(lanes);
    }
  }
}

inline void sum_exact(const KvRecord& r, const std::uint8_t* const* rows, std::size_t count, const float* p,
                      const KvQueries& q, float* out) {
  float value[kKvMostHead];
  for (std::size_t i = 0; i < count; ++i) {
    widen(r.dtype, rows[i], r.head_dim, value);
    for (std::size_t m = 0; m < q.count; ++m) {
      const float weight = p[m * kKvScores + i];
      float* sum = out + m * r.head_dim;
      for (std::size_t c = 0; c < r.head_dim; ++c) sum[c] += weight * value[c];
    }
  }
}

// e^x for x <= 0 within 2 units in the last place, 0 where that is no normal number; NaN stays. x = n ln 2 + r, and
// Taylor's series of e^r to r^7: |r| <= 0.35 leaves 5e-9.
inline float exp_negative(float x) {
  constexpr float kLeast = -87.33654f;  // ln 2^-126
  constexpr float kRound = 0x1.8p23f;   // adding it leaves an integer in the low bits
  const float bounded = x > kLeast ? x : kLeast;
  const float shifted = bounded * 0x1.715476p0f + kRound;
  const float n = shifted - kRound;
  const float rest = (bounded - n * 0x1.62ep-1f) - n * 0x1.0bfbe8p-15f;  // ln 2 in two parts, the first of 12 bits
  float y = 1.0f / 5040;
  y = y * rest + 1.0f / 720;
  y = y * rest + 1.0f / 120;
  y = y * rest + 1.0f / 24;
  y = y * rest + 1.0f / 6;
  y = y * rest + 0.5f;
  y = y * (rest * rest) + rest + 1.0f;
  const float power = float_of((word_of(shifted) - word_of(kRound) + 127u) << 23);
  y = x < kLeast ? 0.0f : y * power;
  return x == x ? y : x;
}

// tanh x = sign(x) (1 - e) / (1 + e), e = exp(-2 |x|).
inline float tanh_of(float x) {
  const float e = exp_negative(-2.0f * __builtin_fabsf(x));
  return __builtin_copysignf((1.0f - e) / (1.0f + e), x);
}

inline void softmax(const KvSoftmax& s, const std::uint8_t* mask, float* scores, float* max, float* sum) {
  for (std::size_t i = 0; i < s.count; ++i) scores[i] *= s.scaling;
  if (s.softcap != 0.0f) {
    for (std::size_t i = 0; i < s.count; ++i) scores[i] = s.softcap * tanh_of(scores[i] / s.softcap);
  }
  if (mask) {
    for (std::size_t i = 0; i < s.count; ++i) scores[i] = mask[i] ? scores[i] : -__builtin_inff();
  }
  float most[kSumLanes], lanes[kSumLanes];
  for (std::size_t l = 0; l < kSumLanes; ++l) most[l] = -__builtin_inff(), lanes[l] = 0.0f;
  const std::size_t whole = s.count / kSumLanes * kSumLanes;
  for (std::size_t i = 0; i < whole; i += kSumLanes) {
    for (std::size_t l = 0; l < kSumLanes; ++l) most[l] = scores[i + l] > most[l] ? scores[i + l] : most[l];
  }
  for (std::size_t i = whole; i < s.count; ++i) most[0] = scores[i] > most[0] ? scores[i] : most[0];
  for (std::size_t l = 1; l < kSumLanes; ++l) most[0] = most[l] > most[0] ? most[l] : most[0];
  *max = most[0];
  // With nothing seen every difference would be a NaN.
  const float base = most[0] == -__builtin_inff() ? 0.0f : most[0];
  for (std::size_t i = 0; i < s.count; ++i) scores[i] = exp_negative(scores[i] - base);
  for (std::size_t i = 0; i < whole; i += kSumLanes) {
    for (std::size_t l = 0; l < kSumLanes; ++l) lanes[l] += scores[i + l];
  }
  for (std::size_t i = whole; i < s.count; ++i) lanes[0] += scores[i];
  *sum = add_kv_lanes(lanes);
}

}  // namespace
}  // namespace bitforbit
