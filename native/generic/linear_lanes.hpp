// Family `lanes` (definition: isa/scalar/linear_lanes.cpp), written once for every vector instruction set.
//
// Included by isa/*/linear_lanes.cpp with V, the vector interface of the codec, and L, that of the sums
// (isa/*/lanes.hpp). Outline: with few tokens and whole tiles, groups go from the decoder's registers straight into the
// products (L::multiply_tiles). Else a panel of some tiles is decoded to a buffer that stays in L1 and multiplied by
// blocks of rows and tokens whose lanes stay in registers; between panels the lanes wait in memory. Plain BF16 is one
// large panel.
#pragma once

#include "generic/planes.hpp"
#include "isa/x86_mxcsr.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kLanes = 16, kChunk = 32;
inline constexpr std::size_t kPanelTiles = 8;  // 16 rows x 512 columns x 2 bytes: half of a 32 KiB L1

inline constexpr std::size_t kPanelChunks = 2 * kPanelTiles;
inline constexpr std::size_t kAhead = 16384;  // bytes of sign_mantissa that are asked for in advance

inline std::size_t chunks_of(std::size_t cols) { return (cols + kChunk - 1) / kChunk; }

// Packed activations: panel after panel, in each token after token, so that a panel's lie together and tokens do not
// meet in the same sets of the cache. The last panel is as wide as its columns.
template <class L>
struct Inputs {
  const std::uint8_t* at;
  std::size_t stride;  // bytes from token to token

  Inputs(const LinearProduct& p, std::size_t panel, std::size_t tile = 0) {
    const std::size_t first = panel * kPanelChunks, left = chunks_of(p.cols) - first;
    stride = (left < kPanelChunks ? left : kPanelChunks) * L::kInputBytes;
    at = p.x + first * p.tokens * L::kInputBytes + tile * 2 * L::kInputBytes;
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

inline void rotate_exponents(const std::uint8_t* table, std::uint8_t* rotated) {
  for (std::size_t i = 0; i < kTableBytes; ++i) rotated[i] = static_cast<std::uint8_t>(table[i] >> 1 | table[i] << 7);
}

// Hardware prefetchers stop at the end of a page, and what a group needs lies in several. To L2, far ahead: 1.6 times
// the speed of asking for L1 on Zen 4.
inline void prefetch_group(const DecodeBlock& b, std::size_t g) {
  __builtin_prefetch(b.planes[0] + 64 * g + kAhead, 0, 2);
  if (g % 4 == 0) __builtin_prefetch(b.digits + 16 * g + kAhead / 4, 0, 2);
}

// Lanes of R rows and T tokens over some chunks, from memory (kStream: rows are asked for in advance) or from a panel.
// weight: [R, w_stride bytes] of BF16; x as packed, tokens x_stride bytes apart; lanes: [T, 16, kLanes], of which R
// rows are used.
template <class L, bool kStream, int R, int T>
inline void multiply_chunks(const std::uint8_t* weight, std::size_t w_stride, const std::uint8_t* x,
                            std::size_t x_stride, std::size_t chunks, float* lanes) {
  for (int part = 0; part < L::kParts; ++part) {
    typename L::Sum sum[R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[r][t] = L::load_sum(lanes + (t * kBlockRows + r) * kLanes, part);
    }
    for (std::size_t c = 0; c < chunks; ++c) {
      typename L::Weights w[R];
      for (int r = 0; r < R; ++r) {
        const std::uint8_t* from = weight + r * w_stride + c * 2 * kChunk;
        if constexpr (kStream) __builtin_prefetch(from + kAhead / 4, 0, 2);
        w[r] = L::load_weights(from, part);
      }
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

template <class L, bool kStream, int T>
inline void multiply_rows(const std::uint8_t* weight, std::size_t w_stride, std::size_t rows, const std::uint8_t* x,
                          std::size_t x_stride, std::size_t chunks, float* lanes) {
  std::size_t r = 0;
  for (; r + L::kRows <= rows; r += L::kRows) {
    multiply_chunks<L, kStream, L::kRows, T>(weight + r * w_stride, w_stride, x, x_stride, chunks, lanes + r * kLanes);
  }
  for (; r < rows; ++r) {
    multiply_chunks<L, kStream, 1, T>(weight + r * w_stride, w_stride, x, x_stride, chunks, lanes + r * kLanes);
  }
}

// Tokens outermost: a panel and the activations of a few tokens fit L1 together.
template <class L, bool kStream>
inline void multiply_panel(const std::uint8_t* weight, std::size_t w_stride, std::size_t rows, Inputs<L> x,
                           std::size_t tokens, std::size_t chunks, float* lanes) {
  const auto multiply = [&]<int T>() {
    multiply_rows<L, kStream, T>(weight, w_stride, rows, x.at, x.stride, chunks, lanes);
  };
  while (tokens) {
    // As equal as possible: 7 tokens are 4 + 3, not 6 + 1.
    const std::size_t parts = (tokens + L::kMostTokens - 1) / L::kMostTokens, n = (tokens + parts - 1) / parts;
    if (n == 1) {
      multiply.template operator()<1>();
    } else if (n == 2) {
      multiply.template operator()<2>();
    } else if (n == 3) {
      multiply.template operator()<3>();
    } else if (n == 4) {
      multiply.template operator()<4>();
    } else if (n == 5) {
      if constexpr (L::kMostTokens >= 5) multiply.template operator()<5>();
    } else {
      if constexpr (L::kMostTokens >= 6) multiply.template operator()<6>();
    }
    tokens -= n, x.at += n * x.stride, lanes += n * kBlockRows * kLanes;
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

// The tail of the next block follows on this one's; a tile uses about 90 bytes.
inline void prefetch_next_tail(const DecodeBlock& b, std::size_t tile) {
  const std::size_t bytes = (b.n2 + 63) / 64 * 16 + (b.n3 + 63) / 64 * 16 + b.n4;
  __builtin_prefetch(b.level2 + bytes + 128 * tile, 0, 2);
  __builtin_prefetch(b.level2 + bytes + 128 * tile + 64, 0, 2);
}

// Expands a block's tail, exponents rotated right by one bit: bits [7] and [6:0] then stand where the two bytes of a
// BF16 want them, and a group is joined without shifts. False: the levels contradict each other.
template <class V>
bool expand_tail(const DecodeBlock& b) {
  std::uint8_t rotated[kTableBytes];
  rotate_exponents(b.table, rotated);
  if (decode_level<V>(b.level3, b.n3, V::make_table(b.table + 6), b.exponents4, b.n4, b.exponents3) != b.n4) {
    return false;
  }
  for (std::size_t i = 0; i < b.n3; i += kGroup) {
    const typename V::B e = V::load(b.exponents3 + i);
    V::store(b.exponents3 + i, V::or2(V::template shl<7>(e), V::template shr<1>(e)));
  }
  return decode_level<V>(b.level2, b.n2, V::make_table(rotated + 3), b.exponents3, b.n3, b.exponents2) == b.n3;
}

template <class V, class L>
bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  const typename L::Flush flushing;
  const DecodeBlock& b = blocks[0];
  if (!expand_tail<V>(b)) return false;
  std::uint8_t rotated[kTableBytes];
  rotate_exponents(b.table, rotated);
  const auto table = V::make_table(rotated);

  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  const std::size_t tiles = b.cols / kGroup;
  std::size_t used = 0, g = 0, tile = 0;
  if (p.tokens == 1 && b.rows == kBlockRows && L::kDirect) {
    used = L::multiply_tiles(table, b, tiles, p.x, lanes);
    if (used > b.n2) return false;
    g = tiles * kBlockRows, tile = tiles;
  } else {
    __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  }
  const auto decode_group = [&](std::uint8_t* out) {
    prefetch_group(b, g);
    L::join(V::exponents(table, b.digits + 16 * g, b.exponents2, used), b.planes[0] + 64 * g).store(out);
    ++g;
  };
  while (tile < tiles) {
    const std::size_t n = tiles - tile < kPanelTiles ? tiles - tile : kPanelTiles;
    for (std::size_t i = 0; i < n; ++i) {
      if (used > b.n2) return false;  // bounds the reads of exponents2: at most a tile past n2, within its slack
      prefetch_next_tail(b, tile + i);
      for (std::size_t row = 0; row < b.rows; ++row) decode_group(panel + (row * kPanelTiles + i) * 2 * kGroup);
    }
    multiply_panel<L, false>(panel, kPanelTiles * 2 * kGroup, b.rows, Inputs<L>(p, tile / kPanelTiles), p.tokens, 2 * n,
                             lanes);
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
    multiply_panel<L, false>(panel, 2 * kGroup, b.rows, Inputs<L>(p, tiles / kPanelTiles, tiles % kPanelTiles),
                             p.tokens, chunks_of(rest), lanes);
  }
  if (used != b.n2) return false;
  write_sums<L>(p, lanes, b.rows, p.sums);
  return true;
}

template <class L>
void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  const typename L::Flush flushing;
  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  const std::size_t stride = 2 * p.cols, whole = p.cols / kChunk, rest = p.cols % kChunk;
  const std::size_t step = p.tokens == 1 ? whole : kPanelChunks;  // one token's panels lie together
  for (std::size_t chunk = 0; chunk < whole; chunk += step) {
    const std::size_t n = whole - chunk < step ? whole - chunk : step;
    multiply_panel<L, true>(weight + chunk * 2 * kChunk, stride, rows, Inputs<L>(p, chunk / kPanelChunks), p.tokens, n,
                            lanes);
  }
  if (rest) {
    __builtin_memset(panel, 0, kBlockRows * 2 * kChunk);
    for (std::size_t r = 0; r < rows; ++r) {
      __builtin_memcpy(panel + r * 2 * kChunk, weight + r * stride + whole * 2 * kChunk, 2 * rest);
    }
    Inputs<L> x(p, whole / kPanelChunks);
    x.at += whole % kPanelChunks * L::kInputBytes;
    multiply_panel<L, false>(panel, 2 * kChunk, rows, x, p.tokens, 1, lanes);
  }
  write_sums<L>(p, lanes, rows, p.sums);
}

template <class V, class L>
constexpr LinearOps lanes_ops(const char* isa, bool bf16, bool f32, const char* family = "lanes") {
  return {family,           isa, nullptr, bf16, f32, false, 1, packed_bytes<L>, L::pack, scratch_bytes, multiply<V, L>,
          multiply_dense<L>};
}

}  // namespace
}  // namespace bitforbit
