// Family `lanes` (definition: isa/scalar/linear_lanes.cpp), written once for every vector instruction set.
//
// Included by isa/*/linear_lanes.cpp with V, the vector interface of the codec, and L, that of the sums (isa/*/lanes.hpp).
// Outline: with few tokens and whole tiles, groups go from the decoder's registers straight into the products
// (L::multiply_tiles). Else a panel of some tiles is decoded to a buffer that stays in L1 and multiplied by blocks of
// rows and tokens whose lanes stay in registers; between panels the lanes wait in memory. Plain BF16 is one large panel.
#pragma once

#include "generic/planes.hpp"
#include "isa/x86_mxcsr.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kLanes = 16, kChunk = 32;
inline constexpr std::size_t kPanelTiles = 8;  // 16 rows x 512 columns x 2 bytes: half of a 32 KiB L1

inline std::size_t chunks_of(std::size_t cols) { return (cols + kChunk - 1) / kChunk; }

// Lanes of R rows and T tokens over some chunks. weight: [R, w_stride bytes] of BF16; x as packed, tokens x_stride
// bytes apart; lanes: [T, 16, kLanes], of which R rows are used.
template <class L, int R, int T>
inline void multiply_chunks(const std::uint8_t* weight, std::size_t w_stride, const std::uint8_t* x,
                            std::size_t x_stride, std::size_t chunks, float* lanes) {
  for (int part = 0; part < L::kParts; ++part) {
    typename L::Sum sum[R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[r][t] = L::load_sum(lanes + (t * kBlockRows + r) * kLanes, part);
    }
    for (std::size_t c = 0; c < chunks; ++c) {
      typename L::Weights w[R];
      for (int r = 0; r < R; ++r) w[r] = L::load_weights(weight + r * w_stride + c * 2 * kChunk, part);
      for (int t = 0; t < T; ++t) {
        const typename L::Inputs v = L::load_inputs(x + t * x_stride + c * L::kInputBytes, part);
        for (int r = 0; r < R; ++r) sum[r][t] = L::step(sum[r][t], w[r], v);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) L::store_sum(lanes + (t * kBlockRows + r) * kLanes, part, sum[r][t]);
    }
  }
}

template <class L, int R>
inline void multiply_tokens(const std::uint8_t* weight, std::size_t w_stride, const std::uint8_t* x,
                            std::size_t x_stride, std::size_t tokens, std::size_t chunks, float* lanes) {
  while (tokens) {
    // As equal as possible: 7 tokens are 4 + 3, not 6 + 1.
    const std::size_t parts = (tokens + L::kMostTokens - 1) / L::kMostTokens, n = (tokens + parts - 1) / parts;
    switch (n) {
      case 1: multiply_chunks<L, R, 1>(weight, w_stride, x, x_stride, chunks, lanes); break;
      case 2: multiply_chunks<L, R, 2>(weight, w_stride, x, x_stride, chunks, lanes); break;
      case 3: multiply_chunks<L, R, 3>(weight, w_stride, x, x_stride, chunks, lanes); break;
      case 4: multiply_chunks<L, R, 4>(weight, w_stride, x, x_stride, chunks, lanes); break;
      case 5:
        if constexpr (L::kMostTokens >= 5) multiply_chunks<L, R, 5>(weight, w_stride, x, x_stride, chunks, lanes);
        break;
      case 6:
        if constexpr (L::kMostTokens >= 6) multiply_chunks<L, R, 6>(weight, w_stride, x, x_stride, chunks, lanes);
        break;
    }
    tokens -= n, x += n * x_stride, lanes += n * kBlockRows * kLanes;
  }
}

template <class L>
inline void multiply_panel(const std::uint8_t* weight, std::size_t w_stride, std::size_t rows, const std::uint8_t* x,
                           std::size_t x_stride, std::size_t tokens, std::size_t chunks, float* lanes) {
  std::size_t r = 0;
  for (; r + L::kRows <= rows; r += L::kRows) {
    multiply_tokens<L, L::kRows>(weight + r * w_stride, w_stride, x, x_stride, tokens, chunks, lanes + r * kLanes);
  }
  for (; r < rows; ++r) {
    multiply_tokens<L, 1>(weight + r * w_stride, w_stride, x, x_stride, tokens, chunks, lanes + r * kLanes);
  }
}

template <class L>
std::size_t packed_bytes(std::size_t tokens, std::size_t cols, bool) {
  return tokens * chunks_of(cols) * L::kInputBytes;
}

// Lanes of all tokens, then a panel.
inline std::size_t lanes_bytes(std::size_t tokens) { return tokens * kBlockRows * kLanes * sizeof(float); }
inline std::size_t scratch_bytes(std::size_t tokens, std::size_t) {
  return lanes_bytes(tokens) + kBlockRows * kPanelTiles * 2 * kGroup;
}

template <class L>
void write_sums(const LinearProduct& p, const float* lanes, std::size_t rows, float* sums) {
  for (std::size_t t = 0; t < p.tokens; ++t) {
    for (std::size_t r = 0; r < rows; ++r) {
      sums[t * p.sums_stride + r] = L::add_lanes(lanes + (t * kBlockRows + r) * kLanes);
    }
  }
}

template <class V, class L>
bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  const FlushDenormals flushing;
  const DecodeBlock& b = blocks[0];
  const auto t1 = V::make_table(b.table), t2 = V::make_table(b.table + 3), t3 = V::make_table(b.table + 6);
  if (decode_level<V>(b.level3, b.n3, t3, b.exponents4, b.n4, b.exponents3) != b.n4) return false;
  if (decode_level<V>(b.level2, b.n2, t2, b.exponents3, b.n3, b.exponents2) != b.n3) return false;

  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  const std::size_t x_stride = chunks_of(p.cols) * L::kInputBytes, tiles = b.cols / kGroup;
  std::size_t used = 0, g = 0, tile = 0;
  if (p.tokens == 1 && b.rows == kBlockRows && L::kDirect) {
    used = L::multiply_tiles(t1, b, tiles, p.x, lanes);
    if (used > b.n2) return false;
    g = tiles * kBlockRows, tile = tiles;
  } else {
    __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  }
  const auto decode_group = [&](std::uint8_t* out) {
    L::decode_group(t1, b.digits + 16 * g, b.planes[0] + 64 * g, b.exponents2, used, out);
    ++g;
  };
  while (tile < tiles) {
    const std::size_t n = tiles - tile < kPanelTiles ? tiles - tile : kPanelTiles;
    for (std::size_t i = 0; i < n; ++i) {
      if (used > b.n2) return false;  // bounds the reads of exponents2: at most a tile past n2, within its slack
      for (std::size_t row = 0; row < b.rows; ++row) decode_group(panel + (row * kPanelTiles + i) * 2 * kGroup);
    }
    multiply_panel<L>(panel, kPanelTiles * 2 * kGroup, b.rows, p.x + tile * 2 * L::kInputBytes, x_stride, p.tokens,
                      2 * n, lanes);
    tile += n;
  }
  if (const std::size_t rest = b.cols % kGroup) {
    __builtin_memset(panel, 0, kBlockRows * 2 * kGroup);
    const Edge edge{rest, b.rows * rest, 0, 2};
    for (std::size_t first = 0; first < edge.run; first += kGroup) {
      if (used > b.n2) return false;
      alignas(64) std::uint8_t buffer[2 * kGroup];
      decode_group(buffer);
      edge.each(first, [&](std::size_t row, std::size_t at, std::size_t from, std::size_t n) {
        __builtin_memcpy(panel + row * 2 * kGroup + at, buffer + from, n);
      });
    }
    multiply_panel<L>(panel, 2 * kGroup, b.rows, p.x + tiles * 2 * L::kInputBytes, x_stride, p.tokens, chunks_of(rest),
                      lanes);
  }
  if (used != b.n2) return false;
  write_sums<L>(p, lanes, b.rows, p.sums);
  return true;
}

template <class L>
void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  const FlushDenormals flushing;
  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  const std::size_t x_stride = chunks_of(p.cols) * L::kInputBytes, stride = 2 * p.cols;
  const std::size_t whole = p.cols / kChunk, rest = p.cols % kChunk;
  multiply_panel<L>(weight, stride, rows, p.x, x_stride, p.tokens, whole, lanes);
  if (rest) {
    __builtin_memset(panel, 0, kBlockRows * 2 * kChunk);
    for (std::size_t r = 0; r < rows; ++r) {
      __builtin_memcpy(panel + r * 2 * kChunk, weight + r * stride + whole * 2 * kChunk, 2 * rest);
    }
    multiply_panel<L>(panel, 2 * kChunk, rows, p.x + whole * L::kInputBytes, x_stride, p.tokens, 1, lanes);
  }
  write_sums<L>(p, lanes, rows, p.sums);
}

template <class V, class L>
constexpr LinearOps lanes_ops(const char* isa, bool bf16, bool f32) {
  return {"lanes", isa, nullptr, bf16, f32, false, 1,
          packed_bytes<L>, L::pack, scratch_bytes, multiply<V, L>, multiply_dense<L>};
}

}  // namespace
}  // namespace bitforbit
