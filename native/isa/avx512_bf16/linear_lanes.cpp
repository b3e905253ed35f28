// Family `lanes` with AVX-512 VBMI2 and BF16: VDPBF16PS is two steps of every lane.
#include "generic/linear_lanes.hpp"
#include "isa/avx512/lanes.hpp"
#include "isa/avx512_vbmi2/vector.hpp"

namespace bitforbit {
namespace {

struct Bf16Sums {
  static constexpr std::size_t kInputBytes = 64, kMostTokens = 6, kRows = 4;
  using Weights = __m512i;
  using Inputs = __m512i;

  static Weights weights(__m512i w) { return w; }
  static Weights load_weights(const std::uint8_t* p, int) { return _mm512_loadu_si512(p); }
  static Inputs load_inputs(const std::uint8_t* p, int) { return _mm512_load_si512(p); }
  static __m512 step(__m512 sum, Weights w, Inputs x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x);
  }
  static void pack(const LinearInput& in, std::uint8_t* packed) {
    const std::size_t bytes = 2 * in.cols, padded = packed_bytes_of(in.cols);
    for (std::size_t t = 0; t < in.tokens; ++t, packed += padded) {
      __builtin_memcpy(packed, in.x + t * bytes, bytes);
      __builtin_memset(packed + bytes, 0, padded - bytes);
    }
  }
  static std::size_t packed_bytes_of(std::size_t cols) { return (cols + 31) / 32 * 64; }
};

}  // namespace

// FP32 activations are left to the level below.
const LinearOps kLanesAvx512Bf16 =
    lanes_ops<Avx512Vbmi2, Lanes512<Avx512Vbmi2, Bf16Sums>>("avx512_bf16", true, false);
}  // namespace bitforbit
