// Compiles the text of isa/avx512_vbmi2 and isa/avx512_bf16 with functions in place of VPEXPANDB, VPCOMPRESSB, VPERMB
// and VDPBF16PS. They follow the pseudo-code of Intel's Software Developer's Manual, volume 2, byte by byte. Built with
// the flags of isa/avx512, so the same rule holds as there: no std:: templates, nothing that the linker could share
// with baseline code.
#include "tests/vbmi2_emulated.hpp"

#include <immintrin.h>

#include <cstdint>

#include "generic/linear_floats.hpp"
#include "tests/linear_emulated.hpp"

namespace {

// VPEXPANDB zmm1 {k1}, zmm2: byte j takes the next byte of src where bit j of k is set, else keeps that of base.
__m512i emulated_mask_expand_epi8(__m512i base, __mmask64 k, __m512i src) {
  alignas(64) std::uint8_t in[64], out[64];
  _mm512_store_si512(in, src);
  _mm512_store_si512(out, base);
  int next = 0;
  for (int j = 0; j < 64; ++j) {
    if (k >> j & 1) out[j] = in[next++];
  }
  return _mm512_load_si512(out);
}

// VPCOMPRESSB zmm1 {k1}{z}, zmm2: the bytes of src whose bit of k is set, in order, then zeros.
__m512i emulated_maskz_compress_epi8(__mmask64 k, __m512i src) {
  alignas(64) std::uint8_t in[64], out[64];
  _mm512_store_si512(in, src);
  _mm512_store_si512(out, _mm512_setzero_si512());
  int next = 0;
  for (int j = 0; j < 64; ++j) {
    if (k >> j & 1) out[next++] = in[j];
  }
  return _mm512_load_si512(out);
}

// VPERMB zmm1, zmm2, zmm3: byte j is byte idx[j] mod 64 of src.
__m512i emulated_permutexvar_epi8(__m512i idx, __m512i src) {
  alignas(64) std::uint8_t in[64], at[64], out[64];
  _mm512_store_si512(in, src);
  _mm512_store_si512(at, idx);
  for (int j = 0; j < 64; ++j) out[j] = in[at[j] & 63];
  return _mm512_load_si512(out);
}

// VDPBF16PS zmm1, zmm2, zmm3: per lane the product of the odd halves is added first, then that of the even ones.
__m512 emulated_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  alignas(64) std::uint8_t x[64], y[64];
  alignas(64) float lane[16];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  _mm512_store_ps(lane, sum);
  for (int l = 0; l < 16; ++l) {
    for (int half = 2; half >= 0; half -= 2) {
      lane[l] = bitforbit::fma_flushed(bitforbit::bf16_to_float(x + 4 * l + half),
                                       bitforbit::bf16_to_float(y + 4 * l + half), lane[l]);
    }
  }
  return _mm512_load_ps(lane);
}

}  // namespace

#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define kLanesAvx512Vbmi2 kLanesAvx512Vbmi2Emulated
#define kLanesAvx512Bf16 kLanesAvx512Bf16Emulated
#define kPairwiseAvx512Vbmi2 kPairwiseAvx512Vbmi2Emulated
#define _mm512_permutexvar_epi8 emulated_permutexvar_epi8
#define _mm512_mask_expand_epi8 emulated_mask_expand_epi8
#define _mm512_maskz_compress_epi8 emulated_maskz_compress_epi8
#define kPlanesAvx512Vbmi2 kPlanesAvx512Vbmi2Emulated
#include "isa/avx512_bf16/linear_lanes.cpp"
#include "isa/avx512_vbmi2/linear_lanes.cpp"
#include "isa/avx512_vbmi2/planes.cpp"
