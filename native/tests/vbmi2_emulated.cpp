// Compiles the text of isa/avx512_vbmi2 with functions in place of VPEXPANDB, VPCOMPRESSB and VPERMB. They follow the
// pseudo-code of Intel's Software Developer's Manual, volume 2, byte by byte. Built with the flags of isa/avx512, so
// the same rule holds as there: no std:: templates, nothing that the linker could share with baseline code.
#include "tests/vbmi2_emulated.hpp"

#include <immintrin.h>

#include <cstdint>

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

}  // namespace

#define _mm512_permutexvar_epi8 emulated_permutexvar_epi8
#define _mm512_mask_expand_epi8 emulated_mask_expand_epi8
#define _mm512_maskz_compress_epi8 emulated_maskz_compress_epi8
#define kPlanesAvx512Vbmi2 kPlanesAvx512Vbmi2Emulated
#include "isa/avx512_vbmi2/planes.cpp"
