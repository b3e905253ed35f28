// The families of oneDNN's BF16 kernels in portable C++, and their definition. Every output is a chain of its own along
// K, cut into blocks of k_block columns (0: all of them), each of which starts at +0; block sums are added in order.
//
// Family `vdpbf16` (k_block rounded up to 2): for every pair of columns sum = fma(odd), then sum = fma(even).
// Family `vdpbf16_emulated`: the same, but denormals count (oneDNN on AVX-512 without that instruction).
// Family `tdpbf16` (k_block rounded up to 32): for every 32 columns the even products, in order, and the odd ones
// apart, each from +0, by fma; then even + odd; then that is added to the sum. Each of these steps flushes denormals,
// its inputs and its results; only the addition of block sums does not. Columns behind the last one are zeros, to a
// multiple of 2 or 32.
#include "generic/linear_floats.hpp"
#include "generic/planes.hpp"
#include "isa/scalar/vector.hpp"
#include "linear_block.hpp"

namespace bitforbit {
namespace {

constexpr std::size_t kStep = 32;

enum class Family { kPairs, kEmulatedPairs, kTiles };

std::size_t pad(std::size_t n) { return (n + kStep - 1) / kStep * kStep; }

std::size_t packed_bytes(std::size_t tokens, std::size_t cols, bool) { return 4 * tokens * pad(cols); }

void pack(const LinearInput& in, std::uint8_t* packed) {
  pack_floats(in.x, in.f32, in.tokens, in.cols, pad(in.cols), reinterpret_cast<float*>(packed));
}

std::size_t scratch_bytes(std::size_t, std::size_t cols) { return kBlockRows * cols * 2; }

// Sum of columns [begin, end), from +0. w(k) and x[k] are zeros from the last column on.
inline float fma_kept(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <float (*kFma)(float, float, float), class Weight>
float sum_pairs(Weight w, const float* x, std::size_t begin, std::size_t end) {
  float sum = 0;
  for (std::size_t k = begin; k < end; k += 2) {
    sum = kFma(w(k + 1), x[k + 1], sum);
    sum = kFma(w(k), x[k], sum);
  }
  return sum;
}

template <class Weight>
float sum_tdpbf16(Weight w, const float* x, std::size_t begin, std::size_t end) {
  float sum = 0;
  for (std::size_t chunk = begin; chunk < end; chunk += kStep) {
    float even = 0, odd = 0;
    for (std::size_t k = chunk; k < chunk + kStep; k += 2) {
      even = fma_flushed(w(k), x[k], even);
      odd = fma_flushed(w(k + 1), x[k + 1], odd);
    }
    sum = add_flushed(sum, add_flushed(even, odd));
  }
  return sum;
}

template <Family F>
void multiply_dense(const LinearProduct& p, const std::uint8_t* weight, std::size_t rows) {
  constexpr std::size_t kUnit = F == Family::kTiles ? kStep : 2;
  const std::size_t wanted = (p.k_block + kUnit - 1) / kUnit * kUnit;
  const std::size_t block = wanted && wanted < p.cols ? wanted : p.cols;
  for (std::size_t t = 0; t < p.tokens; ++t) {
    const float* x = reinterpret_cast<const float*>(p.x) + t * pad(p.cols);
    for (std::size_t r = 0; r < rows; ++r) {
      const std::uint8_t* row = weight + 2 * r * p.cols;
      const auto w = [&](std::size_t k) { return k < p.cols ? bf16_to_float(row + 2 * k) : 0.0f; };
      float total = 0;
      for (std::size_t begin = 0; begin < p.cols; begin += block) {
        const std::size_t end = begin + block < p.cols ? begin + block : p.cols;
        const float sum = F == Family::kTiles   ? sum_tdpbf16(w, x, begin, end)
                          : F == Family::kPairs ? sum_pairs<fma_flushed>(w, x, begin, end)
                                                : sum_pairs<fma_kept>(w, x, begin, end);
        total = begin ? total + sum : sum;
      }
      p.sums[t * p.sums_stride + r] = total;
    }
  }
}

template <Family F>
bool multiply(const LinearProduct& p, const DecodeBlock* blocks, std::size_t) {
  DecodeBlock b = blocks[0];
  b.out = p.scratch, b.out_stride = 2 * b.cols;
  if (!decode_tiles<Scalar, Kind::kBF16, false>(b)) return false;
  multiply_dense<F>(p, p.scratch, b.rows);
  return true;
}

template <Family F>
constexpr LinearOps scalar_ops(const char* family) {
  return {
      .family = family,
      .isa = "scalar",
      .usable = nullptr,
      .bf16 = true,
      .f32 = false,
      .vcvtneps2bf16 = F != Family::kEmulatedPairs,
      .blocks_at_once = 1,
      .packed_bytes = packed_bytes,
      .pack = pack,
      .scratch_bytes = scratch_bytes,
      .multiply = multiply<F>,
      .multiply_dense = multiply_dense<F>,
  };
}

}  // namespace

const LinearOps kVdpbf16Scalar = scalar_ops<Family::kPairs>("vdpbf16");
const LinearOps kEmulatedScalar = scalar_ops<Family::kEmulatedPairs>("vdpbf16_emulated");
const LinearOps kTdpbf16Scalar = scalar_ops<Family::kTiles>("tdpbf16");
}  // namespace bitforbit
