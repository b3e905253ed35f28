// Decode and encode one block of the `planes` codec, written once for every instruction set.
//
// Included by isa/*/planes.cpp after a vector interface V. Outline of decode: the tail's levels are expanded first,
// innermost level first, into scratch (each level is a sequence of exponents for the 3s of the level above); then the
// tiles are walked once. Encode runs the other way. Plain pointers only: see planes_block.hpp.
#pragma once

#include <cstring>

#include "generic/planes_kinds.hpp"
#include "planes_block.hpp"

namespace bitforbit {
namespace {

inline constexpr std::size_t kPrefetchAhead = 16384;

// Expands ceil(n / 64) groups of 2-bit digits to exponents: digits 0-2 through `table`, each 3 by the next byte of
// `next`. Returns how many bytes of `next` were used, or more than `n_next` as soon as that many do not suffice.
template <class V>
inline std::size_t decode_level(const std::uint8_t* packed, std::size_t n, typename V::Table table,
                                const std::uint8_t* next, std::size_t n_next, std::uint8_t* out) {
  std::size_t used = 0;
  for (std::size_t i = 0; i < n; i += kGroup) {
    V::store(out + i, V::exponents(table, packed + i / 4, next, used));
    if (used > n_next) break;
  }
  return used;
}

// Copies 64 elements, `natural` order, to the positions [first, first + 64) of the edge run (row-major over the
// columns behind the last whole tile), or back from there.
struct Edge {
  std::size_t cols, run, column, item;  // edge columns, elements of the run, first edge column, bytes per element

  template <class Copy>
  void each(std::size_t first, Copy copy) const {
    std::size_t done = 0;
    while (done < kGroup && first + done < run) {
      const std::size_t row = (first + done) / cols, col = (first + done) % cols;
      std::size_t n = cols - col;
      if (n > kGroup - done) n = kGroup - done;
      copy(row, (column + col) * item, done * item, n * item);
      done += n;
    }
  }
};

template <class V, Kind K, bool Wide>
bool decode_tiles(const DecodeBlock& b) {
  constexpr std::size_t kItem = item_size(K, Wide);
  const auto t1 = V::make_table(b.table), t2 = V::make_table(b.table + 3), t3 = V::make_table(b.table + 6);
  if (decode_level<V>(b.level3, b.n3, t3, b.exponents4, b.n4, b.exponents3) != b.n4) return false;
  if (decode_level<V>(b.level2, b.n2, t2, b.exponents3, b.n3, b.exponents2) != b.n3) return false;

  std::size_t used = 0, g = 0;
  auto exponents = [&] { return V::exponents(t1, b.digits + 16 * g, b.exponents2, used); };
  const std::size_t tiles = b.cols / kGroup;
  for (std::size_t tile = 0; tile < tiles; ++tile) {
    for (std::size_t row = 0; row < b.rows; ++row, ++g) {
      if (used > b.n2) return false;  // bounds the reads of exponents2: at most 64 past n2, within its slack
      __builtin_prefetch(b.planes[0] + plane_stride(K, 0) * g + kPrefetchAhead, 0, 2);  // see linear_lanes.hpp
      join64<V, K, Wide>(exponents(), b.planes, g, b.out + row * b.out_stride + tile * kGroup * kItem);
    }
  }
  const Edge edge{b.cols % kGroup, b.rows * (b.cols % kGroup), tiles * kGroup, kItem};
  for (std::size_t first = 0; first < edge.run; first += kGroup, ++g) {
    if (used > b.n2) return false;
    alignas(64) std::uint8_t buffer[kGroup * kItem];
    join64<V, K, Wide>(exponents(), b.planes, g, buffer);
    edge.each(first, [&](std::size_t row, std::size_t at, std::size_t from, std::size_t n) {
      std::memcpy(b.out + row * b.out_stride + at, buffer + from, n);
    });
  }
  return used == b.n2;
}

// Appends to `left` the bytes of `ranks` that are at least 3, less 3; stores the digits min(rank, 3).
template <class V>
inline std::size_t encode_digits(typename V::B ranks, std::uint8_t* packed, std::uint8_t* left) {
  const typename V::B digits = V::min_byte(ranks, 3);
  V::pack2(packed, digits);
  return V::compress_store(left, V::equal_mask(digits, 3), V::sub_byte(ranks, 3));
}

// One level of the tail: digits of n ranks, and what is left for the next level.
template <class V>
inline std::size_t encode_level(std::uint8_t* ranks, std::size_t n, std::uint8_t* packed, std::uint8_t* left) {
  std::memset(ranks + n, 0, kGroup);  // the last group is filled up with rank 0
  std::size_t n_left = 0;
  for (std::size_t i = 0; i < n; i += kGroup) {
    n_left += encode_digits<V>(V::load(ranks + i), packed + i / 4, left + n_left);
  }
  return n_left;
}

template <class V, Kind K, bool Wide>
void encode_tiles(EncodeBlock& b) {
  constexpr std::size_t kItem = item_size(K, Wide);
  const typename V::Ranker ranker(b.table);
  std::size_t g = 0;
  b.n2 = b.n4 = 0;
  auto encode64 = [&](const std::uint8_t* src) {
    const typename V::B e = split64<V, K, Wide>(src, b.planes, g);
    const typename V::B ranks = ranker(e);
    b.n2 += encode_digits<V>(ranks, b.digits + 16 * g, b.ranks2 + b.n2);
    const std::uint64_t raw = V::equal_mask(ranks, kCodedRanks);
    if (__builtin_expect(raw != 0, 0)) b.n4 += V::compress_store(b.exponents4 + b.n4, raw, e);
    ++g;
  };
  const std::size_t tiles = b.cols / kGroup;
  for (std::size_t tile = 0; tile < tiles; ++tile) {
    for (std::size_t row = 0; row < b.rows; ++row) encode64(b.src + row * b.src_stride + tile * kGroup * kItem);
  }
  const Edge edge{b.cols % kGroup, b.rows * (b.cols % kGroup), tiles * kGroup, kItem};
  for (std::size_t first = 0; first < edge.run; first += kGroup) {
    alignas(64) std::uint8_t buffer[kGroup * kItem];
    fill_rank0<K, Wide>(buffer, b.table[0]);
    edge.each(first, [&](std::size_t row, std::size_t at, std::size_t to, std::size_t n) {
      std::memcpy(buffer + to, b.src + row * b.src_stride + at, n);
    });
    encode64(buffer);
  }
  b.n3 = encode_level<V>(b.ranks2, b.n2, b.level2, b.ranks3);
  encode_level<V>(b.ranks3, b.n3, b.level3, b.ranks2);  // what is left are the raw exponents, already in place
}

template <class V>
bool decode_block(const DecodeBlock& b) {
  switch (b.kind) {
    case Kind::kBF16: return b.wide ? decode_tiles<V, Kind::kBF16, true>(b) : decode_tiles<V, Kind::kBF16, false>(b);
    case Kind::kF16: return decode_tiles<V, Kind::kF16, false>(b);
    case Kind::kF32: return decode_tiles<V, Kind::kF32, false>(b);
    case Kind::kF8E4M3: return decode_tiles<V, Kind::kF8E4M3, false>(b);
    case Kind::kF8E5M2: return decode_tiles<V, Kind::kF8E5M2, false>(b);
  }
  return false;
}

template <class V>
void encode_block(EncodeBlock& b) {
  switch (b.kind) {
    case Kind::kBF16: return b.wide ? encode_tiles<V, Kind::kBF16, true>(b) : encode_tiles<V, Kind::kBF16, false>(b);
    case Kind::kF16: return encode_tiles<V, Kind::kF16, false>(b);
    case Kind::kF32: return encode_tiles<V, Kind::kF32, false>(b);
    case Kind::kF8E4M3: return encode_tiles<V, Kind::kF8E4M3, false>(b);
    case Kind::kF8E5M2: return encode_tiles<V, Kind::kF8E5M2, false>(b);
  }
}

}  // namespace
}  // namespace bitforbit
