// Family `vdpbf16` with VDPBF16PS itself.
#include "generic/ordered.hpp"

#include "isa/avx512_vbmi2/ordered_tiles.hpp"

namespace bitforbit {
namespace {

struct Bf16 : LanesAvx512 {
  using Flush = NoScope;  // VDPBF16PS flushes whatever MXCSR says
  using Keep = NoScope;

  static void fence(Lanes&) {}
  static void step(Lanes& sum, const std::uint8_t* pairs, const std::uint8_t* x) {
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs)),
                           reinterpret_cast<__m512bh>(pair(x)));
  }
};

}  // namespace

const LinearOps kVdpbf16Avx512Bf16 = ordered_ops<Bf16>("vdpbf16", "avx512_bf16", true, ordered_multiply<Bf16>);
}  // namespace bitforbit
