// Family `lanes`: packed activations, and products of a panel of plain BF16 weights with them.
//
// L is the interface of the sums (isa/*/lanes.hpp): kParts registers hold the lanes of one output.
#pragma once

#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kLanes = 16, kChunk = 32;
inline constexpr std::size_t kPanelTiles = 8;  // 16 rows x 512 columns x 2 bytes: half of a 32 KiB L1
inline constexpr std::size_t kPanelChunks = 2 * kPanelTiles;
inline constexpr std::size_t kTileRowBytes = 2 * kGroup;
inline constexpr std::size_t kAhead = 16384;  // bytes of sign_mantissa that are asked for in advance

inline std::size_t chunks_of(std::size_t cols) { return (cols + kChunk - 1) / kChunk; }

// Packed activations: panel after panel, in each token after token, so that a panel's lie together and tokens do not
// meet in the same sets of the cache. The last panel is as wide as its columns.
template <class L>
struct Inputs {
  const std::uint8_t* at;
  std::size_t stride;  // bytes from token to token

  Inputs(const LinearProduct& p, std::size_t tile) {
    const std::size_t first = tile / kPanelTiles * kPanelChunks, left = chunks_of(p.cols) - first;
    stride = (left < kPanelChunks ? left : kPanelChunks) * L::kInputBytes;
    at = p.x + (first * p.tokens + tile % kPanelTiles * 2) * L::kInputBytes;
  }
};

// Calls place(token, first column, columns, where its packed bytes go) for the stretches of one panel and token each.
template <class L, class Place>
inline void pack_panels(const LinearInput& in, std::uint8_t* packed, Place place) {
  constexpr std::size_t kColumns = kPanelChunks * kChunk;
  for (std::size_t column = 0; column < in.cols; column += kColumns) {
    const std::size_t n = in.cols - column < kColumns ? in.cols - column : kColumns;
    for (std::size_t t = 0; t < in.tokens; ++t) {
      place(t, column, n, packed);
      packed += chunks_of(n) * L::kInputBytes;
    }
  }
}

template <class L>
std::size_t packed_bytes(std::size_t tokens, std::size_t cols, bool) {
  return tokens * chunks_of(cols) * L::kInputBytes;
}

// Plain BF16 weights: bytes from row to row, and from 64 columns to the next 64.
struct Rows {
  const std::uint8_t* at;
  std::size_t row, tile;
};

// What else is done beside the products: before a chunk's weights are loaded, and after every two chunks.
struct Nothing {
  void before(const std::uint8_t*) {}
  void after_tile() {}
};
struct Stream : Nothing {  // weights come from memory
  void before(const std::uint8_t* weight) { __builtin_prefetch(weight + kAhead / 4, 0, 2); }
};

// Lanes of R rows and T tokens over some chunks. x as packed; lanes: [T, 16, kLanes], of which R rows are used.
template <class L, int R, int T, class Beside>
inline void multiply_chunks(Rows w, Inputs<L> x, std::size_t chunks, float* lanes, Beside& beside) {
  Beside mine = beside;  // in registers
  for (int part = 0; part < L::kParts; ++part) {
    typename L::Sum sum[R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[r][t] = L::load_sum(lanes + (t * kBlockRows + r) * kLanes, part);
    }
    const auto chunk = [&](const std::uint8_t* weight, const std::uint8_t* input) __attribute__((always_inline)) {
      typename L::Weights v[R];
      for (int r = 0; r < R; ++r) {
        mine.before(weight + r * w.row);
        v[r] = L::load_weights(weight + r * w.row, part);
      }
      for (int t = 0; t < T; ++t) {
        const typename L::Inputs u = L::load_inputs(input + t * x.stride, part);
        for (int r = 0; r < R; ++r) sum[r][t] = L::step(sum[r][t], v[r], u);
      }
    };
    const std::uint8_t *weight = w.at, *input = x.at, *end = x.at + chunks / 2 * 2 * L::kInputBytes;
    for (; input != end; weight += w.tile, input += 2 * L::kInputBytes) {
      chunk(weight, input);
      chunk(weight + 2 * kChunk, input + L::kInputBytes);
      mine.after_tile();
    }
    if (chunks % 2) chunk(weight, input);
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) L::store_sum(lanes + (t * kBlockRows + r) * kLanes, part, sum[r][t]);
    }
  }
  beside = mine;
}

template <class L, int T, class Beside>
inline void multiply_rows(Rows w, std::size_t rows, Inputs<L> x, std::size_t chunks, float* lanes, Beside& beside) {
  for (std::size_t n = rows / L::kRows; n; --n, w.at += L::kRows * w.row, lanes += L::kRows * kLanes) {
    multiply_chunks<L, L::kRows, T>(w, x, chunks, lanes, beside);
  }
  for (std::size_t n = rows % L::kRows; n; --n, w.at += w.row, lanes += kLanes) {
    multiply_chunks<L, 1, T>(w, x, chunks, lanes, beside);
  }
}

// Any number of tokens, four at a time. Tokens outermost: a panel and the activations of four tokens fit L1.
inline constexpr std::size_t kPanelTokens = 4;

template <class L, class Beside>
inline void multiply_panel(Rows w, std::size_t rows, Inputs<L> x, std::size_t tokens, std::size_t chunks, float* lanes,
                           Beside& beside) {
  for (; tokens >= kPanelTokens; tokens -= kPanelTokens) {
    multiply_rows<L, kPanelTokens>(w, rows, x, chunks, lanes, beside);
    x.at += kPanelTokens * x.stride, lanes += kPanelTokens * kBlockRows * kLanes;
  }
  if (tokens == 3) multiply_rows<L, 3>(w, rows, x, chunks, lanes, beside);
  if (tokens == 2) multiply_rows<L, 2>(w, rows, x, chunks, lanes, beside);
  if (tokens == 1) multiply_rows<L, 1>(w, rows, x, chunks, lanes, beside);
}

}  // namespace
}  // namespace bitforbit
