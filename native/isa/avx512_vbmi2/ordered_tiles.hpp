// Products of families with a chain per output with AVX-512 VBMI2: tiles go from digits to pairs in registers, with
// half the shuffles of a plain transposition; above a few tokens the next tile is decoded between the products of this
// one.
#pragma once

#include "generic/planes.hpp"
#include "isa/avx512/ordered_lanes.hpp"
#include "isa/avx512_vbmi2/exponents.hpp"

namespace bitforbit {
namespace {

// Once per tile, which uses about 90 bytes of the tail: that of the next block follows on this one's.
inline void prefetch_next_tail(const DecodeBlock& b, std::size_t tile) {
  const std::size_t bytes = (b.n2 + 63) / 64 * 16 + (b.n3 + 63) / 64 * 16 + b.n4;
  __builtin_prefetch(b.level2 + bytes + 128 * tile, 0, 2);
  __builtin_prefetch(b.level2 + bytes + 128 * tile + 64, 0, 2);
}

// Tokens from which the products take long enough to hide the decoding of a tile in them.
constexpr int kInterleaveFrom = 7;
// Bytes of sign+mantissa to fetch ahead, to L2; digits: a quarter of that.
constexpr std::size_t kFetchAhead = 16384;

// Four rows of 16-byte runs (columns 8c to 8c + 7 and 32 + 8c to 32 + 8c + 7), gathered into lanes, by four. Unpacked
// twice, each register holds two words (two columns each) of all 16 rows.
inline void unpack_words(const __m512i a[4], __m512i words[4]) {
  const __m512i t0 = _mm512_unpacklo_epi16(a[0], a[2]), t1 = _mm512_unpacklo_epi16(a[1], a[3]);
  const __m512i t2 = _mm512_unpackhi_epi16(a[0], a[2]), t3 = _mm512_unpackhi_epi16(a[1], a[3]);
  words[0] = _mm512_unpacklo_epi16(t0, t1);
  words[1] = _mm512_unpackhi_epi16(t0, t1);
  words[2] = _mm512_unpacklo_epi16(t2, t3);
  words[3] = _mm512_unpackhi_epi16(t2, t3);
}

// Rows i, 4 + i, 8 + i, 12 + i -> lanes: register c gets bytes [16c, 16c + 16) of each.
inline void gather_registers(const __m512i row[16], std::size_t i, __m512i by_lane[4]) {
  const __m512i a = _mm512_shuffle_i32x4(row[i], row[i + 4], 0x44), b = _mm512_shuffle_i32x4(row[i], row[i + 4], 0xee);
  const __m512i c = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0x44);
  const __m512i d = _mm512_shuffle_i32x4(row[i + 8], row[i + 12], 0xee);
  by_lane[0] = _mm512_shuffle_i32x4(a, c, 0x88);
  by_lane[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
  by_lane[2] = _mm512_shuffle_i32x4(b, d, 0x88);
  by_lane[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// Bytes [16c, 16c + 16) of 16 rows of 64 bytes, as words of all rows.
inline void gather_words(const std::uint8_t* rows, std::size_t c, __m512i words[4]) {
  __m512i a[4];
  for (std::size_t i = 0; i < 4; ++i) a[i] = gather_lanes(rows + 64 * i + 16 * c, 64);
  unpack_words(a, words);
}

// Half of the pairs of run c: 4c + 2i and the next (the lower words of the run), and those 16 behind them.
inline void store_pairs(const __m512i e[4], const __m512i top[4], std::size_t c, std::size_t i, std::uint8_t* pairs) {
  for (std::size_t half = 0; half < 2; ++half) {
    __m512i low, high;
    join_words(e[i + 2 * half], top[i + 2 * half], low, high);
    std::uint8_t* to = pairs + 64 * (16 * half + 4 * c + 2 * i);
    Avx512::store(to, low);
    Avx512::store(to + 64, high);
  }
}

// The whole tiles of one block of 16 rows, one after the other.
struct Tiles {
  const std::uint8_t *digits, *top;
  Exponents exponents;
  alignas(64) std::uint8_t rows[kBlockRows * kGroup];  // exponents of the tile under way

  explicit Tiles(const DecodeBlock& b) : digits(b.digits), top(b.planes[0]), exponents(b) {}

  void fetch_ahead() const {
    for (std::size_t i = 0; i < 16; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(top + kFetchAhead + 64 * i), _MM_HINT_T1);
    for (std::size_t i = 0; i < 4; ++i)
      _mm_prefetch(reinterpret_cast<const char*>(digits + kFetchAhead / 4 + 64 * i), _MM_HINT_T1);
  }
  void advance() {
    digits += 16 * kBlockRows;
    top += kGroup * kBlockRows;
  }

  // Not inlined: compiled once, it is called once per tile.
  __attribute__((noinline)) void decode(std::uint8_t* pairs) {
    Exponents next = exponents;  // a copy that stays in registers
    __m512i row[16], run[4][4];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < 16; ++r) row[r] = next(digits + 16 * r);
    exponents = next;
#pragma GCC unroll 4
    for (std::size_t i = 0; i < 4; ++i) {
      __m512i by_lane[4];
      gather_registers(row, i, by_lane);
      for (std::size_t c = 0; c < 4; ++c) run[c][i] = by_lane[c];
    }
#pragma GCC unroll 4
    for (std::size_t c = 0; c < 4; ++c) {
      __m512i e[4], s[4];
      unpack_words(run[c], e);
      gather_words(top, c, s);
      store_pairs(e, s, c, 0, pairs);
      store_pairs(e, s, c, 1, pairs);
    }
    advance();
  }

  // The same with step(pair) called 32 times in between, pairs in order.
  template <class Step>
  void decode_between(std::uint8_t* pairs, Step step) {
    Exponents next = exponents;
#pragma GCC unroll 1
    for (std::size_t r = 0; r < 16; r += 2) {
      Avx512::store(rows + 64 * r, next(digits + 16 * r));
      step(r);
      Avx512::store(rows + 64 * r + 64, next(digits + 16 * r + 16));
      step(r + 1);
      asm volatile("");  // or GCC splits this into a loop that decodes and one that multiplies
    }
    exponents = next;
#pragma GCC unroll 1
    for (std::size_t c = 0; c < 4; ++c) {
      __m512i e[4], s[4];
      gather_words(rows, c, e);
      step(16 + 4 * c);
      gather_words(top, c, s);
      step(17 + 4 * c);
      store_pairs(e, s, c, 0, pairs);
      step(18 + 4 * c);
      store_pairs(e, s, c, 1, pairs);
      step(19 + 4 * c);
    }
    advance();
  }
};

// One block of whole tiles times T tokens. False: more threes than the tail has exponents.
template <class P, int T>
bool multiply_tiles(const LinearProduct& p, const DecodeBlock& b, const Run& run) {
  constexpr std::size_t kTileBytes = kPairs * 64, kInputBytes = 2 * kGroup * T;
  alignas(64) std::uint8_t pairs[2][kTileBytes];
  const std::size_t tiles = b.cols / kGroup;
  const std::uint8_t* x = run.x;
  const typename P::Flush flush;
  Sums<P, T> sums(pairs_per_sum(p));
  Tiles decoder(b);
  decoder.fetch_ahead();
  decoder.decode(pairs[0]);
  std::size_t tile = 0;
  while (tile < tiles) {
    if constexpr (T >= kInterleaveFrom) {
      // Tiles that end neither the matrix nor inside a K block, so that the sums can stay in registers.
      const std::size_t left = tiles - 1 - tile, whole = sums.pairs_left / kPairs,
                        end = tile + (left < whole ? left : whole);
      if (tile < end) {
        sums.pairs_left -= (end - tile) * kPairs;
        typename P::Lanes sum[T];
        for (int t = 0; t < T; ++t) sum[t] = sums.now[t];
        for (; tile < end; ++tile, x += kInputBytes) {
          if (decoder.exponents.used > b.n2) return false;  // bounds the reads of exponents2: a tile past the end
          decoder.fetch_ahead();
          prefetch_next_tail(b, tile);
          const std::uint8_t* now = pairs[tile % 2];
          decoder.decode_between(pairs[(tile + 1) % 2], [&](std::size_t pair) {
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) P::step(sum[t], now + 64 * pair, x + 2 * kGroup * t + 4 * pair);
          });
        }
        for (int t = 0; t < T; ++t) sums.now[t] = sum[t];
        if (!sums.pairs_left) sums.end_block();
        continue;
      }
    }
    if (decoder.exponents.used > b.n2) return false;
    sums.tile(pairs[tile % 2], x, kPairs);
    ++tile, x += kInputBytes;
    if (tile < tiles) {
      decoder.fetch_ahead();
      prefetch_next_tail(b, tile);
      decoder.decode(pairs[tile % 2]);
    }
  }
  sums.finish(run.sums, p.sums_stride, run.tokens, kBlockRows);
  return decoder.exponents.used == b.n2;
}

template <class P>
bool ordered_multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  const DecodeBlock& b = blocks[0];
  if (b.rows != kBlockRows || b.cols % kGroup) return multiply_decoded<Avx512Vbmi2, P>(p, blocks, 1);
  if (!expand_tail<Avx512Vbmi2>(b)) return false;
  bool good = true;
  over_tokens(p, [&]<int T>(const Run& run) { good = good && multiply_tiles<P, T>(p, b, run); });
  return good;
}

}  // namespace
}  // namespace bitforbit
