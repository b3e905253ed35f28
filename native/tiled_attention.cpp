#include "tiled_attention.hpp"

#include <algorithm>
#include <vector>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "planes.hpp"

namespace bitforbit {
namespace {

std::size_t ceil_div(std::size_t n, std::size_t d) { return (n + d - 1) / d; }

// Floats on a 64-byte boundary, not initialised.
class Floats {
 public:
  explicit Floats(std::size_t count) : buffer_(4 * count) {}
  float* data() const { return reinterpret_cast<float*>(buffer_.data()); }

 private:
  Buffer buffer_;
};

// One head's keys and values as the kernels read them.
struct Head {
  std::size_t keys, channels, blocks, steps, strips;
  Floats key_blocks, value_strips;

  Head(std::size_t keys, std::size_t channels)
      : keys(keys),
        channels(channels),
        blocks(ceil_div(keys, kTiledWidth)),
        steps(ceil_div(channels, kTiledDepth)),
        strips(ceil_div(channels, kTiledWidth)),
        key_blocks(blocks * steps * kTiledDepth * kTiledWidth),
        value_strips(strips * keys * kTiledWidth) {}

  void pack(const float* k, const float* v, int threads) {
    parallel_for(blocks, 1, threads, [&](std::size_t block) {
      float* out = key_blocks.data() + block * steps * kTiledDepth * kTiledWidth;
      std::fill_n(out, steps * kTiledDepth * kTiledWidth, 0.0f);
      for (std::size_t i = 0; i < std::min(kTiledWidth, keys - block * kTiledWidth); ++i) {
        const std::size_t key = block * kTiledWidth + i;
        for (std::size_t c = 0; c < channels; ++c) out[c * kTiledWidth + i] = k[key * channels + c];
        for (std::size_t strip = 0; strip < strips; ++strip) {
          const std::size_t first = strip * kTiledWidth, count = std::min(kTiledWidth, channels - first);
          float* row = value_strips.data() + (strip * keys + key) * kTiledWidth;
          std::copy_n(v + key * channels + first, count, row);
          std::fill_n(row + count, kTiledWidth - count, 0.0f);
        }
      }
    });
  }
};

// Queries [first, first + count) of a head, from packing to the rows of the output.
void run_block(const TiledAttentionArguments& a, const TiledAttentionOps& ops, const Head& head, const float* q,
               float* out, std::size_t count) {
  const std::size_t rows = ceil_div(count, kTiledGroup) * kTiledGroup, depth = head.steps * kTiledDepth;
  const std::size_t score_blocks = a.square ? head.blocks : 1;
  Floats room(rows * (depth + (score_blocks + head.strips) * kTiledWidth + 2));
  float* queries = room.data();
  float* scores = queries + rows * depth;
  float* result = scores + rows * score_blocks * kTiledWidth;
  float* maxima = result + rows * head.strips * kTiledWidth;
  std::fill_n(queries, rows * depth, 0.0f);
  for (std::size_t row = 0; row < count; ++row) {
    float* at = queries + row / kTiledGroup * kTiledDepth * kTiledGroup + row % kTiledGroup;
    for (std::size_t c = 0; c < head.channels; ++c) {
      at[c / kTiledDepth * kTiledDepth * rows + c % kTiledDepth * kTiledGroup] = q[row * head.channels + c];
    }
  }
  const TiledAttentionBlock block{
      rows,   head.keys, head.steps, head.strips,  queries, a.scaling, head.key_blocks.data(), head.value_strips.data(),
      scores, result,    maxima,     maxima + rows};
  (a.square ? ops.square : ops.flash)(block);
  for (std::size_t row = 0; row < count; ++row) {
    for (std::size_t strip = 0; strip < head.strips; ++strip) {
      const std::size_t first = strip * kTiledWidth;
      std::copy_n(result + (strip * rows + row) * kTiledWidth, std::min(kTiledWidth, head.channels - first),
                  out + row * head.channels + first);
    }
  }
}

}  // namespace

const TiledAttentionOps& find_tiled_attention(std::string_view isa) {
  static constexpr const TiledAttentionOps* kAll[] = {&kTiledAttentionScalar,
#if BITFORBIT_X86
                                                      &kTiledAttentionAvx2, &kTiledAttentionAvx512
#endif
  };
  const TiledAttentionOps* best = &kTiledAttentionScalar;
  for (const Implementation& level : implementations()) {
    for (const TiledAttentionOps* ops : kAll) {
      if (level.supported && level.name == ops->isa) best = ops;
    }
    if (level.name == isa) break;
  }
  return *best;
}

void tiled_attention(const TiledAttentionArguments& a, const TiledAttentionOps& ops) {
  const std::size_t rows = ceil_div(a.rows, kTiledGroup) * kTiledGroup;
  Head head(a.keys, a.channels);
  for (std::size_t h = 0; h < a.heads; ++h) {
    head.pack(a.k + h * a.keys * a.channels, a.v + h * a.keys * a.channels, a.threads);
    parallel_for(ceil_div(a.queries, rows), 1, a.threads, [&](std::size_t block) {
      const std::size_t first = block * rows, at = (h * a.queries + first) * a.channels;
      run_block(a, ops, head, a.q + at, a.out + at, std::min(rows, a.queries - first));
    });
  }
}

}  // namespace bitforbit
