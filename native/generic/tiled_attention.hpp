// Attention with tiles that stay in the L1 cache, in two orders, for any vector length.
//
// `flash` (arXiv 2307.08691, Algorithm 1): queries and their output stay, keys and values stream. Its tile has room for
//   fewer queries the larger the head is.
// `square` (arXiv 2402.07443, Algorithm 1, with a running maximum): first every tile of scores, rows x kTiledWidth,
// which
//   stays while columns of queries and keys stream; then every tile of the output, which stays while scores and values
//   stream. The tile does not depend on the head; the scores go out of L1 and come back once per strip of channels.
//
// Written with GCC's vector extensions; each isa/*/tiled_attention.cpp compiles it with its own flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "tiled_attention_block.hpp"

namespace bitforbit {
namespace {

template <int kLanes>
struct Vector {
  typedef float Floats __attribute__((vector_size(4 * kLanes)));
  typedef std::int32_t Ints __attribute__((vector_size(4 * kLanes)));

  static Floats load(const float* p) {
    Floats v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }
  static Floats all(float x) { return Floats{} + x; }

  // exp(x) for x <= 0, to about 2 units in the last place; below -87.3 exp(-87.3); NaN stays.
  static Floats exp(Floats x) {
    x = all(-87.3f) > x ? all(-87.3f) : x;
    const Floats magic = all(0x1.8p23f);
    const Floats shifted = x * 1.44269504f + magic;  // its low bits are round(x / ln 2)
    const Floats n = shifted - magic;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
    Floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;  // [30:23] biased exponent of 2^n
    return p * (Floats)power;
  }
};

// Rows of `c` (kTiledWidth apart), by kTiledGroup: c += a b with `depth` terms, which are summed before they are
// added: sums of few terms are more accurate. Term t of row r of a group is at
// a[r * kRow + t * kTerm], the next group at a + kNextGroup; term t of b is the row b + t * kTiledWidth.
template <int kLanes, int kVectors, std::size_t kRow, std::size_t kTerm, std::size_t kNextGroup>
void add_product(float* c, const float* a, const float* b, std::size_t rows, std::size_t depth) {
  using V = Vector<kLanes>;
  constexpr std::size_t kWide = kLanes * kVectors;
  static_assert(kTiledWidth % kWide == 0);
  for (std::size_t row = 0; row < rows; row += kTiledGroup, a += kNextGroup, c += kTiledGroup * kTiledWidth) {
    for (std::size_t column = 0; column < kTiledWidth; column += kWide) {
      typename V::Floats sum[kTiledGroup][kVectors] = {};
      for (std::size_t t = 0; t < depth; ++t) {
        typename V::Floats right[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) right[j] = V::load(b + t * kTiledWidth + column + j * kLanes);
#pragma GCC unroll 8
        for (std::size_t i = 0; i < kTiledGroup; ++i) {
          const typename V::Floats left = V::all(a[i * kRow + t * kTerm]);
#pragma GCC unroll 8
          for (int j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
        }
      }
#pragma GCC unroll 8
      for (std::size_t i = 0; i < kTiledGroup; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
          float* at = c + i * kTiledWidth + column + j * kLanes;
          V::store(at, V::load(at) + sum[i][j]);
        }
      }
    }
  }
}

template <int kLanes, int kVectors>
struct TiledAttention {
  using V = Vector<kLanes>;
  using Floats = typename V::Floats;

  static std::size_t keys_of(const TiledAttentionBlock& b, std::size_t first) {
    return b.keys - first < kTiledWidth ? b.keys - first : kTiledWidth;
  }

  // scores = Q K^T of the block's queries and one block of keys; -inf beyond the last key.
  static void score(const TiledAttentionBlock& b, std::size_t first, float* scores) {
    std::memset(scores, 0, b.rows * kTiledWidth * 4);
    const float* keys = b.key_blocks + first * b.steps * kTiledDepth;
    for (std::size_t step = 0; step < b.steps; ++step) {
      add_product<kLanes, kVectors, 1, kTiledGroup, kTiledDepth * kTiledGroup>(
          scores, b.queries + step * kTiledDepth * b.rows, keys + step * kTiledDepth * kTiledWidth, b.rows,
          kTiledDepth);
    }
    for (std::size_t key = keys_of(b, first); key < kTiledWidth; ++key) {
      for (std::size_t row = 0; row < b.rows; ++row) scores[row * kTiledWidth + key] = -__builtin_inff();
    }
  }

  // One strip of the output += P V for one block of keys.
  static void weigh(const TiledAttentionBlock& b, std::size_t first, std::size_t strip, const float* weights) {
    const float* values = b.value_strips + (strip * b.keys + first) * kTiledWidth;
    float* out = b.out + strip * b.rows * kTiledWidth;
    const std::size_t keys = keys_of(b, first);
    for (std::size_t key = 0; key < keys; key += kTiledDepth) {
      const std::size_t depth = keys - key < kTiledDepth ? keys - key : kTiledDepth;
      add_product<kLanes, kVectors, kTiledWidth, 1, kTiledGroup * kTiledWidth>(
          out, weights + key, values + key * kTiledWidth, b.rows, depth);
    }
  }

  // scores *= scaling; returns the largest of them and `most`. (Scaled queries would be rounded once more.)
  static float scale_and_largest(float* scores, float scaling, float most) {
    Floats best = V::all(most);
    for (std::size_t i = 0; i < kTiledWidth; i += kLanes) {
      const Floats s = V::load(scores + i) * scaling;
      V::store(scores + i, s);
      best = best > s ? best : s;
    }
    for (int lane = 0; lane < kLanes; ++lane) most = most > best[lane] ? most : best[lane];
    return most;
  }

  // scores = exp(scores - most); returns their sum.
  static float exp_and_sum(float* scores, float most) {
    Floats sum{};
    for (std::size_t i = 0; i < kTiledWidth; i += kLanes) {
      const Floats e = V::exp(V::load(scores + i) - most);
      V::store(scores + i, e);
      sum += e;
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
    return total;
  }

  static void multiply_row(float* row, float factor) {
    for (std::size_t i = 0; i < kTiledWidth; i += kLanes) V::store(row + i, V::load(row + i) * factor);
  }

  static void begin(const TiledAttentionBlock& b) {
    std::memset(b.out, 0, b.strips * b.rows * kTiledWidth * 4);
    for (std::size_t row = 0; row < b.rows; ++row) b.maxima[row] = -__builtin_inff(), b.sums[row] = 0;
  }

  static void divide(const TiledAttentionBlock& b) {
    for (std::size_t row = 0; row < b.strips * b.rows; ++row) {
      multiply_row(b.out + row * kTiledWidth, 1.0f / b.sums[row % b.rows]);
    }
  }

  static void flash(const TiledAttentionBlock& b) {
    begin(b);
    for (std::size_t first = 0; first < b.keys; first += kTiledWidth) {
      score(b, first, b.scores);
      for (std::size_t row = 0; row < b.rows; ++row) {
        float* scores = b.scores + row * kTiledWidth;
        const float before = b.maxima[row], most = scale_and_largest(scores, b.scaling, before);
        if (most > before) {  // in a row's first block both are multiplied by zero: they are zeros
          const float shift = V::exp(V::all(before - most))[0];
          b.sums[row] *= shift, b.maxima[row] = most;
          for (std::size_t strip = 0; strip < b.strips; ++strip) {
            multiply_row(b.out + (strip * b.rows + row) * kTiledWidth, shift);
          }
        }
        b.sums[row] += exp_and_sum(scores, most);
      }
      for (std::size_t strip = 0; strip < b.strips; ++strip) weigh(b, first, strip, b.scores);
    }
    divide(b);
  }

  static void square(const TiledAttentionBlock& b) {
    begin(b);
    for (std::size_t first = 0; first < b.keys; first += kTiledWidth) {
      float* scores = b.scores + first * b.rows;
      score(b, first, scores);
      for (std::size_t row = 0; row < b.rows; ++row) {
        b.maxima[row] = scale_and_largest(scores + row * kTiledWidth, b.scaling, b.maxima[row]);
      }
    }
    for (std::size_t strip = 0; strip < b.strips; ++strip) {
      for (std::size_t first = 0; first < b.keys; first += kTiledWidth) {
        float* scores = b.scores + first * b.rows;
        for (std::size_t row = 0; !strip && row < b.rows; ++row) {  // each exponential is taken once, and kept
          b.sums[row] += exp_and_sum(scores + row * kTiledWidth, b.maxima[row]);
        }
        weigh(b, first, strip, scores);
      }
    }
    divide(b);
  }
};

template <int kLanes, int kVectors>
constexpr TiledAttentionOps tiled_attention_ops(const char* isa) {
  return {isa, TiledAttention<kLanes, kVectors>::flash, TiledAttention<kLanes, kVectors>::square};
}

}  // namespace
}  // namespace bitforbit
