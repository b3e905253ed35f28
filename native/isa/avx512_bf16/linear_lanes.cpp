// Family `lanes` with AVX-512 VBMI2 and BF16: VDPBF16PS is two steps of every lane.
#include "generic/linear_lanes.hpp"

#include "isa/avx512/lanes.hpp"
#include "isa/avx512_vbmi2/vector.hpp"

namespace bitforbit {
namespace {

struct Bf16Sums {
  static constexpr std::size_t kInputBytes = 64, kRows = 4;
  static constexpr bool kBeside = true;
  using Weights = __m512i;
  using Inputs = __m512i;

  static Weights weights(__m512i w) { return w; }
  static Weights load_weights(const std::uint8_t* p, int) { return _mm512_loadu_si512(p); }
  static Inputs load_inputs(const std::uint8_t* p, int) { return _mm512_load_si512(p); }
  static __m512 step(__m512 sum, Weights w, Inputs x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static void pack(const LinearInput& in, std::uint8_t* packed) {
    pack_panels<Bf16Sums>(in, packed, [&](std::size_t token, std::size_t column, std::size_t n, std::uint8_t* out) {
      __builtin_memcpy(out, in.x + 2 * (token * in.cols + column), 2 * n);
      __builtin_memset(out + 2 * n, 0, chunks_of(n) * kInputBytes - 2 * n);
    });
  }
};

}  // namespace

// FP32 activations are left to the level below.
const LinearOps kLanesAvx512Bf16 = lanes_ops<Avx512Vbmi2, Lanes512<Avx512Vbmi2, Bf16Sums>>("avx512_bf16", true, false);
}  // namespace bitforbit
