// Tiled attention: every instruction set and order against attention in double, in allocations of exactly their size.
#include "tiled_attention.hpp"

#include <cmath>
#include <cstring>

#include "dispatch.hpp"
#include "tests/check.hpp"

namespace bitforbit::testing {
namespace {

struct Sizes {
  std::size_t heads, queries, keys, channels;
};

// Floats in memory without slack, uniform in [-1, 1).
struct Matrix {
  ExactBytes bytes;
  Matrix(std::size_t count, Random& random) : bytes(4 * count) {
    for (std::size_t i = 0; i < count; ++i) data()[i] = static_cast<float>(random.bits() % 4096) / 2048 - 1;
  }
  float* data() { return reinterpret_cast<float*>(bytes.data()); }
};

std::vector<double> reference(const Sizes& s, const float* q, const float* k, const float* v, double scaling) {
  std::vector<double> out(s.heads * s.queries * s.channels), p(s.keys);
  for (std::size_t row = 0; row < s.heads * s.queries; ++row) {
    const std::size_t first = row / s.queries * s.keys;
    double most = -INFINITY, sum = 0;
    for (std::size_t key = 0; key < s.keys; ++key) {
      p[key] = 0;
      for (std::size_t c = 0; c < s.channels; ++c) {
        p[key] += scaling * q[row * s.channels + c] * k[(first + key) * s.channels + c];
      }
      most = std::max(most, p[key]);
    }
    for (double& x : p) sum += x = std::exp(x - most);
    for (std::size_t key = 0; key < s.keys; ++key) {
      for (std::size_t c = 0; c < s.channels; ++c) {
        out[row * s.channels + c] += p[key] / sum * v[(first + key) * s.channels + c];
      }
    }
  }
  return out;
}

}  // namespace

TEST(tiled_attention_is_attention) {
  Random random(3);
  for (const Sizes s : {Sizes{1, 1, 1, 1}, {2, 5, 65, 17}, {1, 70, 63, 64}, {1, 33, 130, 100}, {3, 4, 200, 130}}) {
    Matrix q(s.heads * s.queries * s.channels, random), out(s.heads * s.queries * s.channels, random);
    Matrix k(s.heads * s.keys * s.channels, random), v(s.heads * s.keys * s.channels, random);
    const std::vector<double> expected = reference(s, q.data(), k.data(), v.data(), 0.3);
    for (const Implementation& level : implementations()) {
      if (!level.supported) continue;
      for (const bool square : {false, true}) {
        for (const std::size_t rows : {1, 8, 64}) {
          const TiledAttentionArguments a{q.data(), k.data(),   v.data(), out.data(), s.heads, s.queries,
                                          s.keys,   s.channels, 0.3f,     square,     rows,    2};
          std::memset(out.bytes.data(), 0xff, out.bytes.size());
          tiled_attention(a, find_tiled_attention(level.name));
          for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::abs(out.data()[i] - expected[i]) < 2e-6);
        }
      }
    }
  }
}

}  // namespace bitforbit::testing
