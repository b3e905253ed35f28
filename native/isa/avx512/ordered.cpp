// Family `vdpbf16` with AVX-512 as in Skylake-X: FMA in place of VDPBF16PS, denormals flushed by MXCSR.
#include "generic/planes.hpp"
#include "isa/avx512/ordered_lanes.hpp"
#include "isa/avx512/vector.hpp"
#include "isa/x86_mxcsr.hpp"

namespace bitforbit {
namespace {

struct FmaAvx512 : LanesAvx512 {
  using Flush = FlushDenormals;
  using Keep = KeepDenormals;

  static void fence(Lanes& a) { asm volatile("" : "+v"(a)); }
  static void step(Lanes& sum, const std::uint8_t* pairs, const std::uint8_t* x) {
    const __m512i odd = _mm512_set1_epi32(static_cast<int>(0xffff0000)), w = _mm512_loadu_si512(pairs), v = pair(x);
    const auto floats = [](__m512i a) { return _mm512_castsi512_ps(a); };
    sum = _mm512_fmadd_ps(floats(_mm512_and_si512(w, odd)), floats(_mm512_and_si512(v, odd)), sum);
    sum = _mm512_fmadd_ps(floats(_mm512_slli_epi32(w, 16)), floats(_mm512_slli_epi32(v, 16)), sum);
  }
};

bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  b.out = p.scratch, b.out_stride = 2 * b.cols;
  if (!decode_tiles<Avx512, Kind::kBF16, false>(b)) return false;
  ordered_multiply_dense<FmaAvx512>(p, p.scratch, b.rows);
  return true;
}

}  // namespace

const LinearOps kVdpbf16Avx512{
    .family = "vdpbf16",
    .isa = "avx512",
    .usable = nullptr,
    .bf16 = true,
    .f32 = false,
    .vcvtneps2bf16 = true,
    .blocks_at_once = 1,
    .packed_bytes = ordered_packed_bytes,
    .pack = ordered_pack,
    .scratch_bytes = ordered_scratch_bytes,
    .multiply = multiply,
    .multiply_dense = ordered_multiply_dense<FmaAvx512>,
};
}  // namespace bitforbit
