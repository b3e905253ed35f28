// Compiles the text of isa/amx with functions in place of the tile instructions. They follow the pseudo-code of Intel's
// Software Developer's Manual, volume 2. Built with the flags of isa/avx512_vbmi2, so the same rule holds as there: no
// std:: templates, nothing that the linker could share with baseline code.
#include "tests/amx_emulated.hpp"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

struct EmulatedTile {
  std::uint8_t rows = 0;
  std::uint16_t row_bytes = 0;
  alignas(64) std::uint8_t bytes[16][64];
};

thread_local EmulatedTile emulated[8];

// LDTILECFG: [0] palette, [16 + 2t] bytes per row and [48 + t] rows of tile t. Every tile becomes zeros.
void emulated_loadconfig(const void* config) {
  const auto* c = static_cast<const std::uint8_t*>(config);
  if (c[0] != 1) __builtin_trap();
  for (int t = 0; t < 8; ++t) {
    emulated[t].rows = c[48 + t];
    emulated[t].row_bytes = static_cast<std::uint16_t>(c[16 + 2 * t] | c[17 + 2 * t] << 8);
    if (emulated[t].rows > 16 || emulated[t].row_bytes > 64) __builtin_trap();
    std::memset(emulated[t].bytes, 0, sizeof emulated[t].bytes);
  }
}

// TILERELEASE: no tile is configured.
void emulated_release() {
  for (auto& t : emulated) t.rows = 0, t.row_bytes = 0;
}

EmulatedTile& configured(int tile) {
  if (!emulated[tile].rows) __builtin_trap();  // #UD
  return emulated[tile];
}

// TILEZERO: also the bytes outside the configured part.
void emulated_zero(int tile) { std::memset(configured(tile).bytes, 0, sizeof(EmulatedTile::bytes)); }

// TILELOADD: what lies behind a row or the last row becomes zeros.
void emulated_loadd(int tile, const void* base, std::size_t stride) {
  EmulatedTile& t = configured(tile);
  emulated_zero(tile);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(t.bytes[r], static_cast<const char*>(base) + static_cast<std::size_t>(r) * stride, t.row_bytes);
  }
}

void emulated_stored(int tile, void* base, std::size_t stride) {
  const EmulatedTile& t = configured(tile);
  for (int r = 0; r < t.rows; ++r) {
    std::memcpy(static_cast<char*>(base) + static_cast<std::size_t>(r) * stride, t.bytes[r], t.row_bytes);
  }
}

__m128 bf16_at(const EmulatedTile& t, int row, int column) {
  std::uint32_t word = 0;
  std::memcpy(reinterpret_cast<char*>(&word) + 2, t.bytes[row] + 2 * column, 2);
  return _mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(word)));
}

// TDPBF16PS: FMA with DAZ and FTZ. srcdest.row[m].fp32[n] += sum over k of even products + sum of odd products.
void emulated_dpbf16ps(int srcdest, int src1, int src2) {
  EmulatedTile& d = configured(srcdest);
  const EmulatedTile &a = configured(src1), &b = configured(src2);
  if (a.row_bytes / 4 != b.rows || b.row_bytes != d.row_bytes || a.rows != d.rows) __builtin_trap();  // #UD
  const unsigned before = _mm_getcsr();
  _mm_setcsr(before | 0x8040);
  asm volatile("" ::: "memory");
  for (int m = 0; m < d.rows; ++m) {
    for (int n = 0; n < d.row_bytes / 4; ++n) {
      __m128 even = _mm_setzero_ps(), odd = _mm_setzero_ps();
      for (int k = 0; k < a.row_bytes / 4; ++k) {
        even = _mm_fmadd_ss(bf16_at(a, m, 2 * k), bf16_at(b, k, 2 * n), even);
        odd = _mm_fmadd_ss(bf16_at(a, m, 2 * k + 1), bf16_at(b, k, 2 * n + 1), odd);
      }
      const __m128 sum = _mm_load_ss(reinterpret_cast<const float*>(d.bytes[m]) + n);
      _mm_store_ss(reinterpret_cast<float*>(d.bytes[m]) + n, _mm_add_ss(sum, _mm_add_ss(even, odd)));
    }
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(before);
}

}  // namespace

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define kTdpbf16Amx kTdpbf16AmxEmulated
#include "isa/amx/ordered.cpp"
