// Family `lanes` (definition: isa/scalar/linear_lanes.cpp), written once for every vector instruction set.
//
// Included by isa/*/linear_lanes.cpp with V, the vector interface of the codec, and L, that of the sums
// (isa/*/lanes.hpp). Outline: with one token, groups go from the decoder's registers straight into the products
// (L::multiply_tiles). Else a panel of some tiles is decoded to a buffer that stays in L1 and multiplied by blocks of
// rows and tokens whose lanes stay in registers; between panels the lanes wait in memory. Decoding and products use
// other units of the CPU: where registers suffice (L::kBeside), the next panel is decoded beside the products.
#pragma once

#include "generic/lanes_panel.hpp"
#include "generic/planes.hpp"
#include "isa/x86_mxcsr.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

inline void rotate_exponents(const std::uint8_t* table, std::uint8_t* rotated) {
  for (std::size_t i = 0; i < kTableBytes; ++i) rotated[i] = static_cast<std::uint8_t>(table[i] >> 1 | table[i] << 7);
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

// The groups of a block in order.
template <class V, class L>
struct Groups {
  typename V::Table table;
  const std::uint8_t *digits, *sign_mantissa, *exponents2;
  const std::uint8_t* next_tail;  // that of the next block follows on this one's
  std::size_t used = 0, n2;

  explicit Groups(const DecodeBlock& b) : digits(b.digits), sign_mantissa(b.planes[0]), exponents2(b.exponents2) {
    std::uint8_t rotated[kTableBytes];
    rotate_exponents(b.table, rotated);
    table = V::make_table(rotated);
    n2 = b.n2;
    next_tail = b.level2 + (b.n2 + 63) / 64 * 16 + (b.n3 + 63) / 64 * 16 + b.n4;
  }

  // Asked before every tile, this bounds the reads of exponents2: at most a tile past n2, within its slack.
  bool ran_out() const { return used > n2; }

  // Group `ahead` from here; advance() then passes several. Hardware prefetchers stop at the end of a page, and what a
  // group needs lies in several. To L2, far ahead: 1.6 times the speed of asking for L1 on Zen 4.
  auto group(std::size_t ahead = 0) {
    __builtin_prefetch(sign_mantissa + 64 * ahead + kAhead, 0, 2);
    if (ahead % 4 == 0) __builtin_prefetch(digits + 16 * ahead + kAhead / 4, 0, 2);
    return L::join(V::exponents(table, digits + 16 * ahead, exponents2, used), sign_mantissa + 64 * ahead);
  }
  void advance(std::size_t groups) { digits += 16 * groups, sign_mantissa += 64 * groups; }
  void prefetch_next_tail() {  // once per tile, which uses about 90 bytes
    __builtin_prefetch(next_tail, 0, 2);
    __builtin_prefetch(next_tail + 64, 0, 2);
    next_tail += 128;
  }
};

// Decodes the next panel beside the products of the last one: N groups after every tile.
template <class V, class L, int N>
struct Decoding : Nothing {
  Groups<V, L> groups;
  std::uint8_t* out;
  std::size_t left;  // groups, a multiple of N and of 16

  void after_tile() {
    if (!left) return;
    if (groups.ran_out()) {
      left = 0;
      return;
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) groups.group(static_cast<std::size_t>(i)).store(out + i * kTileRowBytes);
    groups.advance(N);
    out += N * kTileRowBytes;
    left -= N;
    if (left % kBlockRows == 0) groups.prefetch_next_tail();
  }
};

// Lanes of all tokens, then two panels.
inline constexpr std::size_t kPanelBytes = kBlockRows * kPanelTiles * kTileRowBytes;
inline std::size_t lanes_bytes(std::size_t tokens) { return tokens * kBlockRows * kLanes * sizeof(float); }
inline std::size_t scratch_bytes(std::size_t tokens, std::size_t) { return lanes_bytes(tokens) + 2 * kPanelBytes; }

template <class L>
void write_sums(const LinearProduct& p, const float* lanes, std::size_t rows, float* sums) {
  for (std::size_t t = 0; t < p.tokens; ++t) {
    for (std::size_t r = 0; r < rows; ++r) {
      sums[t * p.sums_stride + r] = L::add_lanes(lanes + (t * kBlockRows + r) * kLanes);
    }
  }
}

inline std::size_t panel_tiles(std::size_t tile, std::size_t tiles) {
  return tiles - tile < kPanelTiles ? tiles - tile : kPanelTiles;
}

// Whole tiles, a panel at a time.
template <class V, class L>
bool multiply_panels(const LinearProduct& p, Groups<V, L>& groups, std::size_t rows, std::size_t tiles,
                     std::uint8_t* panel, float* lanes) {
  for (std::size_t tile = 0; tile < tiles; tile += kPanelTiles) {
    const std::size_t n = panel_tiles(tile, tiles);
    std::uint8_t* out = panel;
    for (std::size_t i = 0; i < n; ++i) {
      if (groups.ran_out()) return false;
      groups.prefetch_next_tail();
      for (std::size_t row = 0; row < rows; ++row, out += kTileRowBytes) {
        groups.group(0).store(out);
        groups.advance(1);
      }
    }
    Nothing nothing;
    multiply_panel<L>({panel, kTileRowBytes, rows * kTileRowBytes}, rows, Inputs<L>(p, tile), p.tokens, 2 * n, lanes,
                      nothing);
  }
  return true;
}

// The same, blocks of 16 rows, each panel decoded beside the products of the one before.
template <class V, class L, int N>
bool multiply_beside(const LinearProduct& p, Groups<V, L>& groups, std::size_t tiles, std::uint8_t* panels,
                     float* lanes) {
  Decoding<V, L, N> decoding{{}, groups, panels, panel_tiles(0, tiles) * kBlockRows};
  while (decoding.left) decoding.after_tile();
  for (std::size_t tile = 0; tile < tiles; tile += kPanelTiles) {
    const std::uint8_t* panel = panels + tile / kPanelTiles % 2 * kPanelBytes;
    const std::size_t n = panel_tiles(tile, tiles);
    if (tile + n < tiles) {
      decoding.out = panels + (tile / kPanelTiles + 1) % 2 * kPanelBytes;
      decoding.left = panel_tiles(tile + n, tiles) * kBlockRows;
    }
    multiply_panel<L>({panel, kTileRowBytes, kBlockRows * kTileRowBytes}, kBlockRows, Inputs<L>(p, tile), p.tokens,
                      2 * n, lanes, decoding);
    while (decoding.left) decoding.after_tile();
  }
  groups = decoding.groups;
  return !groups.ran_out();
}

template <class V, class L>
bool multiply_tiles(const LinearProduct& p, Groups<V, L>& groups, std::size_t rows, std::size_t tiles,
                    std::uint8_t* panels, float* lanes) {
  if constexpr (L::kDirect) {
    if (rows == kBlockRows && p.tokens == 1) return L::multiply_tiles(groups, tiles, p.x, lanes);
  }
  __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  if constexpr (L::kBeside) {
    if (rows == kBlockRows) {
      // A panel's products take 4 * ceil(tokens / 4) passes, after each of whose tiles N groups are decoded.
      const std::size_t passes = (p.tokens + kPanelTokens - 1) / kPanelTokens;
      if (passes == 1) return multiply_beside<V, L, 4>(p, groups, tiles, panels, lanes);
      if (passes < 4) return multiply_beside<V, L, 2>(p, groups, tiles, panels, lanes);
      return multiply_beside<V, L, 1>(p, groups, tiles, panels, lanes);
    }
  }
  return multiply_panels(p, groups, rows, tiles, panels, lanes);
}

template <class V, class L>
bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  const typename L::Flush flushing;
  const DecodeBlock& b = blocks[0];
  if (!expand_tail<V>(b)) return false;
  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  const std::size_t tiles = b.cols / kGroup;
  Groups<V, L> groups(b);
  if (!multiply_tiles(p, groups, b.rows, tiles, panel, lanes)) return false;
  if (const std::size_t rest = b.cols % kGroup) {
    __builtin_memset(panel, 0, kBlockRows * kTileRowBytes);
    const Edge edge{rest, b.rows * rest, 0, 2};
    for (std::size_t first = 0; first < edge.run; first += kGroup) {
      if (groups.ran_out()) return false;
      alignas(64) std::uint8_t buffer[kTileRowBytes];
      groups.group(0).store(buffer);
      groups.advance(1);
      edge.each(first, [&](std::size_t row, std::size_t at, std::size_t from, std::size_t n) {
        __builtin_memcpy(panel + row * kTileRowBytes + at, buffer + from, n);
      });
    }
    Nothing nothing;
    multiply_panel<L>({panel, kTileRowBytes, 0}, b.rows, Inputs<L>(p, tiles), p.tokens, chunks_of(rest), lanes,
                      nothing);
  }
  if (groups.used != b.n2) return false;
  write_sums<L>(p, lanes, b.rows, p.sums);
  return true;
}

template <class L>
void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  const typename L::Flush flushing;
  float* lanes = reinterpret_cast<float*>(p.scratch);
  std::uint8_t* panel = p.scratch + lanes_bytes(p.tokens);
  __builtin_memset(lanes, 0, lanes_bytes(p.tokens));
  const std::size_t stride = 2 * p.cols, tiles = p.cols / kGroup, rest = p.cols % kGroup;
  const std::size_t step = p.tokens == 1 ? tiles : kPanelTiles;  // one token's panels lie together
  Stream stream;
  for (std::size_t tile = 0; tile < tiles; tile += step) {
    const std::size_t n = tiles - tile < step ? tiles - tile : step;
    multiply_panel<L>({weight + tile * kTileRowBytes, stride, kTileRowBytes}, rows, Inputs<L>(p, tile), p.tokens, 2 * n,
                      lanes, stream);
  }
  if (rest) {
    __builtin_memset(panel, 0, kBlockRows * kTileRowBytes);
    for (std::size_t r = 0; r < rows; ++r) {
      __builtin_memcpy(panel + r * kTileRowBytes, weight + r * stride + tiles * kTileRowBytes, 2 * rest);
    }
    Nothing nothing;
    multiply_panel<L>({panel, kTileRowBytes, 0}, rows, Inputs<L>(p, tiles), p.tokens, chunks_of(rest), lanes, nothing);
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
