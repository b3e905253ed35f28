// Families of products whose outputs are chains along K, one per (row, token): the order of oneDNN's BF16 kernels.
// Written once for every instruction set; isa/scalar/ordered.cpp says what each family means.
//
// Outline: activations are packed tile by tile (64 columns) into pairs of columns, every token's 32 pairs of a tile in
// one run. Weights of 16 rows x 64 columns are transposed to 32 vectors, one per pair of columns with the 16 rows as
// lanes; each is then multiplied with every token's pair. P is the arithmetic of one instruction set:
//   P::Lanes                        16 FP32, one per row
//   P::zero, P::add, P::store       of Lanes
//   P::transpose(rows, stride, to)  16 rows of 64 BF16 -> 32 x 16 pairs
//   P::step(lanes, pairs, x)        lanes += odd product, then even product; pairs of 16 rows times the pair at x
//   P::Flush, P::Keep               for the lifetime of a Flush `step` flushes denormals; a Keep suspends that
//   P::fence(lanes)                 the compiler moves no arithmetic on them across, nor across a Flush or Keep
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "generic/planes.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

constexpr std::size_t kPairs = kGroup / 2;  // pairs of columns per tile
constexpr std::size_t kTokensAtOnce = 16;   // tokens that share one decoded tile

inline std::size_t ordered_tiles(std::size_t cols) { return (cols + kGroup - 1) / kGroup; }

// Tokens of a run for which kernels exist: the next of 1 to 8, 12 and 16.
constexpr std::size_t padded_tokens(std::size_t n) { return n <= 8 ? n : n <= 12 ? 12 : 16; }

inline std::size_t ordered_packed_bytes(std::size_t tokens, std::size_t cols, bool) {
  const std::size_t rest = tokens % kTokensAtOnce;
  return (tokens - rest + padded_tokens(rest)) * ordered_tiles(cols) * kGroup * 2;
}

// [runs of 16 tokens][tiles][padded tokens of the run][64 columns], zeros behind the last column and token.
inline void ordered_pack(const LinearInput& in, std::uint8_t* packed) {
  for (std::size_t first = 0; first < in.tokens; first += kTokensAtOnce) {
    const std::size_t n = in.tokens - first < kTokensAtOnce ? in.tokens - first : kTokensAtOnce;
    for (std::size_t column = 0; column < in.cols; column += kGroup) {
      const std::size_t width = in.cols - column < kGroup ? in.cols - column : kGroup;
      for (std::size_t t = first; t < first + n; ++t, packed += 2 * kGroup) {
        std::memcpy(packed, in.x + 2 * (t * in.cols + column), 2 * width);
        std::memset(packed + 2 * width, 0, 2 * (kGroup - width));
      }
      const std::size_t padding = (padded_tokens(n) - n) * 2 * kGroup;
      std::memset(packed, 0, padding);
      packed += padding;
    }
  }
}

// A partial sum ends where its K block does: never inside a pair of columns.
inline std::size_t pairs_per_sum(const LinearProduct& p) {
  const std::size_t all = (p.cols + 1) / 2, wanted = (p.k_block + 1) / 2;
  return wanted && wanted < all ? wanted : all;
}

// In place of a Flush or Keep where the mode does not matter, or is as it should be.
struct NoScope {
  NoScope() {}
};

template <bool kScope, class Scope>
struct EitherScope {
  using Type = Scope;
};
template <class Scope>
struct EitherScope<false, Scope> {
  using Type = NoScope;
};
template <bool kScope, class Scope>
using Either = typename EitherScope<kScope, Scope>::Type;

// The sums of T tokens: of the K block under way, and of the blocks before it.
template <class P, int T>
struct Sums {
  typename P::Lanes now[T], before[T];
  std::size_t pairs_left, pairs_per_sum;
  bool first = true;

  explicit Sums(std::size_t per_sum) : pairs_left(per_sum), pairs_per_sum(per_sum) {
    for (int t = 0; t < T; ++t) {
      now[t] = before[t] = P::zero();
      P::fence(now[t]);
    }
  }

  // n pairs of every token, which all belong to the K block under way. x: [T][32 pairs] from the first of them on.
  void steps(const std::uint8_t* pairs, const std::uint8_t* x, std::size_t n) {
    typename P::Lanes sum[T];
    for (int t = 0; t < T; ++t) sum[t] = now[t];
    for (std::size_t i = 0; i < n; ++i) {
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) P::step(sum[t], pairs + 64 * i, x + 2 * kGroup * t + 4 * i);
    }
    for (int t = 0; t < T; ++t) now[t] = sum[t];
    pairs_left -= n;
  }

  void end_block() {
    for (int t = 0; t < T; ++t) P::fence(now[t]);
    {
      const typename P::Keep keep;
      for (int t = 0; t < T; ++t) {
        P::fence(now[t]);
        before[t] = first ? now[t] : P::add(before[t], now[t]);
        P::fence(before[t]);
      }
    }
    for (int t = 0; t < T; ++t) {
      now[t] = P::zero();
      P::fence(now[t]);
    }
    first = false;
    pairs_left = pairs_per_sum;
  }

  // One tile of `count` pairs, wherever K blocks end.
  void tile(const std::uint8_t* pairs, const std::uint8_t* x, std::size_t count) {
    for (std::size_t done = 0; done < count;) {
      const std::size_t n = count - done < pairs_left ? count - done : pairs_left;
      steps(pairs + 64 * done, x + 4 * done, n);
      done += n;
      if (!pairs_left) end_block();
    }
  }

  // Writes the sums of some tokens and rows: [tokens, stride].
  void finish(float* out, std::size_t stride, std::size_t tokens, std::size_t rows) {
    if (pairs_left != pairs_per_sum) end_block();
    for (std::size_t t = 0; t < tokens; ++t) {
      alignas(64) float lanes[kBlockRows];
      P::store(lanes, before[t]);
      std::memcpy(out + t * stride, lanes, rows * sizeof(float));
    }
  }
};

// The activations of a run of tokens and where its sums go.
struct Run {
  const std::uint8_t* x;  // [tiles][T][64] of BF16
  float* sums;            // [tokens, sums_stride]
  std::size_t tokens;     // at most T
};

// Rows of plain BF16 times T tokens.
template <class P, int T>
void multiply_rows(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows, const Run& run) {
  const std::uint8_t* x = run.x;
  alignas(64) std::uint8_t pairs[kPairs * 64], edge[kBlockRows * kGroup * 2];
  const typename P::Flush flush;
  Sums<P, T> sums(pairs_per_sum(p));
  for (std::size_t column = 0; column < p.cols; column += kGroup, x += 2 * kGroup * T) {
    const std::size_t width = p.cols - column < kGroup ? p.cols - column : kGroup;
    if (rows == kBlockRows && width == kGroup) {
      P::transpose(weight + 2 * column, 2 * p.cols, pairs);
    } else {
      std::memset(edge, 0, sizeof edge);
      for (std::size_t r = 0; r < rows; ++r) {
        std::memcpy(edge + 2 * kGroup * r, weight + 2 * (r * p.cols + column), 2 * width);
      }
      P::transpose(edge, 2 * kGroup, pairs);
    }
    sums.tile(pairs, x, (width + 1) / 2);
  }
  sums.finish(run.sums, p.sums_stride, run.tokens, rows);
}

// Calls kernel<T> for the T of this run of tokens.
template <int T, class Kernel>
void with_tokens(std::size_t tokens, Kernel kernel) {
  if constexpr (T > 0) {
    if (padded_tokens(tokens) == T) return kernel.template operator()<T>();
    with_tokens<(T > 8 ? T == 16 ? 12 : 8 : T - 1)>(tokens, kernel);
  }
}

// body<T>(run) for every run of at most 16 tokens.
template <class Body>
void over_tokens(const LinearProduct& p, Body body) {
  for (std::size_t first = 0; first < p.tokens; first += kTokensAtOnce) {
    const std::size_t n = p.tokens - first < kTokensAtOnce ? p.tokens - first : kTokensAtOnce;
    const Run run{p.x + first * ordered_tiles(p.cols) * kGroup * 2, p.sums + first * p.sums_stride, n};
    with_tokens<static_cast<int>(kTokensAtOnce)>(n, [&]<int T>() { body.template operator()<T>(run); });
  }
}

template <class P>
void ordered_multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  over_tokens(p, [&]<int T>(const Run& run) { multiply_rows<P, T>(p, weight, rows, run); });
}

inline std::size_t ordered_scratch_bytes(std::size_t, std::size_t cols) { return kBlockRows * cols * 2; }

// A block decoded to rows by V, then multiplied like plain BF16.
template <class V, class P>
bool multiply_decoded(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  b.out = p.scratch, b.out_stride = 2 * b.cols;
  if (!decode_tiles<V, Kind::kBF16, false>(b)) return false;
  ordered_multiply_dense<P>(p, p.scratch, b.rows);
  return true;
}

template <class P>
constexpr LinearOps ordered_ops(const char* family, const char* isa, bool vcvtneps2bf16,
                                bool (*multiply)(const LinearProduct&, const DecodeBlock*, std::size_t),
                                bool (*usable)() = nullptr) {
  return {
      .family = family,
      .isa = isa,
      .usable = usable,
      .bf16 = true,
      .f32 = false,
      .vcvtneps2bf16 = vcvtneps2bf16,
      .blocks_at_once = 1,
      .packed_bytes = ordered_packed_bytes,
      .pack = ordered_pack,
      .scratch_bytes = ordered_scratch_bytes,
      .multiply = multiply,
      .multiply_dense = ordered_multiply_dense<P>,
  };
}

}  // namespace
}  // namespace bitforbit
