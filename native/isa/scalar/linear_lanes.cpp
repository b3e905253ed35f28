// Family `lanes` in portable C++, and its definition: 16 FP32 lanes per output, all starting at +0. K is walked in
// chunks of 32 columns (filled up with zeros); in each, lane l takes column 2l + 1, then column 2l. At the end lanes
// l and l + 8 are added, then l and l + 4, + 2, + 1. Denormals are flushed throughout.
// Family `lanes_pairwise` (oneDNN's product with one token on AVX-512 without BF16): the same lanes; l and l + 8 are
// added, then neighbours, then neighbours of these. Denormals count.
#include "generic/linear_floats.hpp"
#include "generic/planes.hpp"
#include "isa/scalar/vector.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

std::size_t pad32(std::size_t n) { return (n + 31) / 32 * 32; }

std::size_t packed_bytes(std::size_t tokens, std::size_t cols, bool) { return 4 * tokens * pad32(cols); }

void pack(const LinearInput& in, std::uint8_t* packed) {
  pack_floats(in.x, in.f32, in.tokens, in.cols, pad32(in.cols), reinterpret_cast<float*>(packed));
}

std::size_t scratch_bytes(std::size_t, std::size_t cols) { return kBlockRows * cols * 2; }

template <bool kPairwise>
float dot(const std::uint8_t* weight, const float* x, std::size_t cols) {
  const auto fma = [](float a, float b, float c) { return kPairwise ? __builtin_fmaf(a, b, c) : fma_flushed(a, b, c); };
  float lane[16] = {};
  for (std::size_t chunk = 0; chunk < cols; chunk += 32) {
    for (std::size_t l = 0; l < 16; ++l) {
      const std::size_t even = chunk + 2 * l, odd = even + 1;
      lane[l] = fma(odd < cols ? bf16_to_float(weight + 2 * odd) : 0.0f, x[odd], lane[l]);
      lane[l] = fma(even < cols ? bf16_to_float(weight + 2 * even) : 0.0f, x[even], lane[l]);
    }
  }
  for (std::size_t n = 8; n; n /= 2) {
    for (std::size_t l = 0; l < n; ++l) {
      if (!kPairwise) {
        lane[l] = add_flushed(lane[l], lane[l + n]);
      } else {
        lane[l] = n == 8 ? lane[l] + lane[l + 8] : lane[2 * l] + lane[2 * l + 1];
      }
    }
  }
  return lane[0];
}

template <bool kPairwise>
void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  const float* x = reinterpret_cast<const float*>(p.x);
  for (std::size_t t = 0; t < p.tokens; ++t) {
    for (std::size_t r = 0; r < rows; ++r) {
      p.sums[t * p.sums_stride + r] = dot<kPairwise>(weight + 2 * r * p.cols, x + t * pad32(p.cols), p.cols);
    }
  }
}

template <bool kPairwise>
bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  b.out = p.scratch, b.out_stride = 2 * b.cols;
  if (!decode_tiles<Scalar, Kind::kBF16, false>(b)) return false;
  multiply_dense<kPairwise>(p, p.scratch, b.rows);
  return true;
}

template <bool kPairwise>
constexpr LinearOps scalar_ops(const char* family) {
  return {
      .family = family,
      .isa = "scalar",
      .usable = nullptr,
      .bf16 = true,
      .f32 = !kPairwise,
      .vcvtneps2bf16 = false,
      .blocks_at_once = 1,
      .packed_bytes = packed_bytes,
      .pack = pack,
      .scratch_bytes = scratch_bytes,
      .multiply = multiply<kPairwise>,
      .multiply_dense = multiply_dense<kPairwise>,
  };
}

}  // namespace

const LinearOps kLanesScalar = scalar_ops<false>("lanes");
const LinearOps kPairwiseScalar = scalar_ops<true>("lanes_pairwise");
}  // namespace bitforbit
