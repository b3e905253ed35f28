// Family `lanes` in portable C++, and its definition: 16 FP32 lanes per output, all starting at +0. K is walked in
// chunks of 32 columns (filled up with zeros); in each, lane l takes column 2l + 1, then column 2l. At the end lanes
// l and l + 8 are added, then l and l + 4, + 2, + 1. Denormals are flushed throughout.
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

float dot(const std::uint8_t* weight, const float* x, std::size_t cols) {
  float lane[16] = {};
  for (std::size_t chunk = 0; chunk < cols; chunk += 32) {
    for (std::size_t l = 0; l < 16; ++l) {
      const std::size_t even = chunk + 2 * l, odd = even + 1;
      lane[l] = fma_flushed(odd < cols ? bf16_to_float(weight + 2 * odd) : 0.0f, x[odd], lane[l]);
      lane[l] = fma_flushed(even < cols ? bf16_to_float(weight + 2 * even) : 0.0f, x[even], lane[l]);
    }
  }
  for (std::size_t n = 8; n; n /= 2) {
    for (std::size_t l = 0; l < n; ++l) lane[l] = add_flushed(lane[l], lane[l + n]);
  }
  return lane[0];
}

void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  const float* x = reinterpret_cast<const float*>(p.x);
  for (std::size_t t = 0; t < p.tokens; ++t) {
    for (std::size_t r = 0; r < rows; ++r) {
      p.sums[t * p.sums_stride + r] = dot(weight + 2 * r * p.cols, x + t * pad32(p.cols), p.cols);
    }
  }
}

bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  b.out = p.scratch, b.out_stride = 2 * b.cols;
  if (!decode_tiles<Scalar, Kind::kBF16, false>(b)) return false;
  multiply_dense(p, p.scratch, b.rows);
  return true;
}

}  // namespace

const LinearOps kLanesScalar{
    .family = "lanes",
    .isa = "scalar",
    .usable = nullptr,
    .bf16 = true,
    .f32 = true,
    .vcvtneps2bf16 = false,
    .blocks_at_once = 1,
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
    .multiply = multiply,
    .multiply_dense = multiply_dense,
};
}  // namespace bitforbit
