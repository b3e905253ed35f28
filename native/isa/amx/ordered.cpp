// Family `tdpbf16` with AMX: 16 rows x 32 columns of weights are one tile register, 32 columns of up to 16 tokens
// another. Needs VBMI2 for the decoding, which every CPU with AMX has.
#include "generic/ordered.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include "generic/planes.hpp"
#include "isa/avx512_vbmi2/exponents.hpp"

namespace bitforbit {
namespace {

constexpr std::size_t kStep = 32;  // columns per TDPBF16PS
constexpr std::size_t kTile = kBlockRows * kStep * 2;
// Tile registers, which GCC wants as literals: 0 holds sums, 1 weights, 2 activations.

// The operand of LDTILECFG, palette 1.
struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

std::size_t steps_of(std::size_t cols) { return (cols + kStep - 1) / kStep; }

std::size_t packed_bytes(std::size_t tokens, std::size_t cols, bool) { return tokens * steps_of(cols) * kStep * 2; }

// [runs of 16 tokens][steps of 32 columns][16 pairs][tokens of the run], zeros behind the last column.
void pack(const LinearInput& in, std::uint8_t* packed) {
  for (std::size_t first = 0; first < in.tokens; first += kTokensAtOnce) {
    const std::size_t n = in.tokens - first < kTokensAtOnce ? in.tokens - first : kTokensAtOnce;
    for (std::size_t column = 0; column < steps_of(in.cols) * kStep; column += 2) {
      for (std::size_t t = first; t < first + n; ++t, packed += 4) {
        const std::size_t bytes = column + 1 < in.cols ? 4 : column < in.cols ? 2 : 0;
        std::memset(packed, 0, 4);
        std::memcpy(packed, in.x + 2 * (t * in.cols + column), bytes);
      }
    }
  }
}

// The sums of up to 16 tokens for 16 rows: in tile register 0 for the K block under way.
struct TileSums {
  std::size_t tokens, steps_left, steps_per_sum;
  bool first = true;
  alignas(64) float before[kBlockRows * kTokensAtOnce];  // [16, tokens]

  TileSums(std::size_t n, const LinearProduct& p) : tokens(n) {
    const std::size_t all = steps_of(p.cols), wanted = steps_of(p.k_block);
    steps_left = steps_per_sum = wanted && wanted < all ? wanted : all;
    TileConfig config;
    const auto set = [&](int tile, std::size_t bytes) {
      config.rows[tile] = kBlockRows;
      config.bytes_per_row[tile] = static_cast<std::uint16_t>(bytes);
    };
    set(0, 4 * tokens);
    set(1, 2 * kStep);
    set(2, 4 * tokens);
    _tile_loadconfig(&config);
    _tile_zero(0);
  }
  ~TileSums() { _tile_release(); }
  TileSums(const TileSums&) = delete;

  // weights: [16, 32]; x: [16 pairs, tokens].
  void step(const std::uint8_t* weights, const std::uint8_t* x) {
    _tile_loadd(1, weights, 2 * kStep);
    _tile_loadd(2, x, 4 * tokens);
    _tile_dpbf16ps(0, 1, 2);
    if (--steps_left == 0) end_block();
  }

  void end_block() {
    alignas(64) float now[kBlockRows * kTokensAtOnce];
    _tile_stored(0, now, 4 * tokens);
    for (std::size_t i = 0; i < kBlockRows * tokens; ++i) before[i] = first ? now[i] : before[i] + now[i];
    _tile_zero(0);
    first = false;
    steps_left = steps_per_sum;
  }

  void finish(float* out, std::size_t stride, std::size_t rows) {
    if (steps_left != steps_per_sum) end_block();
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t r = 0; r < rows; ++r) out[t * stride + r] = before[r * tokens + t];
    }
  }
};

// body(tokens, packed activations, sums) for every run of at most 16 tokens.
template <class Body>
void over_runs(const LinearProduct& p, Body body) {
  for (std::size_t first = 0; first < p.tokens; first += kTokensAtOnce) {
    const std::size_t n = p.tokens - first < kTokensAtOnce ? p.tokens - first : kTokensAtOnce;
    body(n, p.x + first * steps_of(p.cols) * kStep * 2, p.sums + first * p.sums_stride);
  }
}

void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  over_runs(p, [&](std::size_t tokens, const std::uint8_t* x, float* out) {
    alignas(64) std::uint8_t tile[kTile] = {};
    TileSums sums(tokens, p);
    for (std::size_t column = 0; column < p.cols; column += kStep, x += 2 * kStep * tokens) {
      const std::size_t width = p.cols - column < kStep ? p.cols - column : kStep;
      if (width < kStep) std::memset(tile, 0, sizeof tile);
      for (std::size_t r = 0; r < rows; ++r) {
        std::memcpy(tile + 2 * kStep * r, weight + 2 * (r * p.cols + column), 2 * width);
      }
      sums.step(tile, x);
    }
    sums.finish(out, p.sums_stride, rows);
  });
}

// One block of whole tiles. False: more threes than the tail has exponents.
bool multiply_tiles(const LinearProduct& p, const DecodeBlock& b, std::size_t tokens, const std::uint8_t* x,
                    float* out) {
  // Two buffers each, so that a tile register is loaded while the next columns are decoded.
  alignas(64) std::uint8_t left[2][kTile], right[2][kTile];
  const std::uint8_t *digits = b.digits, *top = b.planes[0];
  Exponents exponents(b);
  TileSums sums(tokens, p);
  for (std::size_t i = 0; i < b.cols / kGroup; ++i, x += 4 * kStep * tokens) {
    if (exponents.used > b.n2) return false;  // bounds the reads of exponents2: a tile past the end
    for (std::size_t r = 0; r < kBlockRows; ++r, digits += kGroup / 4, top += kGroup) {
      _mm_prefetch(reinterpret_cast<const char*>(top + 4096), _MM_HINT_T0);
      if (r % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(digits + 1024), _MM_HINT_T0);
      __m512i low, high;
      join_words(exponents(digits), Avx512::load(top), low, high);
      Avx512::store(left[i % 2] + 2 * kStep * r, low);
      Avx512::store(right[i % 2] + 2 * kStep * r, high);
    }
    sums.step(left[i % 2], x);
    sums.step(right[i % 2], x + 2 * kStep * tokens);
  }
  sums.finish(out, p.sums_stride, kBlockRows);
  return exponents.used == b.n2;
}

bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  if (b.rows != kBlockRows || b.cols % kGroup) {
    b.out = p.scratch, b.out_stride = 2 * b.cols;
    if (!decode_tiles<Avx512Vbmi2, Kind::kBF16, false>(b)) return false;
    multiply_dense(p, p.scratch, b.rows);
    return true;
  }
  if (!expand_tail<Avx512Vbmi2>(b)) return false;
  bool good = true;
  over_runs(p, [&](std::size_t tokens, const std::uint8_t* x, float* out) {
    good = good && multiply_tiles(p, b, tokens, x, out);
  });
  return good;
}

// The CPU has AMX-BF16 (CPUID leaf 7: EDX bits 22 and 24) and Linux lets this process use the tile registers.
bool has_amx() {
  static const bool has = [] {
    unsigned a = 7, b, c = 0, d;
    asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    constexpr unsigned kBits = 1u << 22 | 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return (d & kBits) == kBits && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

}  // namespace

const LinearOps kTdpbf16Amx{
    .family = "tdpbf16",
    .isa = "avx512_bf16",
    .usable = has_amx,
    .bf16 = true,
    .f32 = false,
    .vcvtneps2bf16 = true,
    .blocks_at_once = 1,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = ordered_scratch_bytes,
    .multiply = multiply,
    .multiply_dense = multiply_dense,
};
}  // namespace bitforbit
