#include "linear.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "dispatch.hpp"
#include "parallel.hpp"
#include "workspace.hpp"

namespace bitforbit {
namespace {

// Weights that a task should have at least, or handing it out costs more than it saves.
constexpr std::size_t kWeightsPerTask = 1 << 16;

std::size_t pad64(std::size_t n) { return (n + 63) / 64 * 64; }

thread_local Workspace workspace;

std::uint16_t load_u16(const std::uint8_t* p) { return static_cast<std::uint16_t>(p[0] | p[1] << 8); }

float load_float(const std::uint8_t* p, bool f32, std::size_t i) {
  if (!f32) return std::bit_cast<float>(static_cast<std::uint32_t>(load_u16(p + 2 * i)) << 16);
  float value;
  std::memcpy(&value, p + 4 * i, 4);
  return value;
}

// FP32 to BF16, to nearest even. Like VCVTNEPS2BF16: denormals become zeros and a NaN keeps its upper bits; else all
// NaNs become one. Written for the compiler to vectorize: no branches.
template <bool Instruction>
void to_bf16(const float* from, std::size_t count, std::uint8_t* to) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t word = std::bit_cast<std::uint32_t>(from[i]);
    const auto magnitude = static_cast<std::int32_t>(word & 0x7fffffff);
    std::uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    if (Instruction) rounded = magnitude < 0x00800000 ? word >> 31 << 15 : rounded;
    rounded = magnitude > 0x7f800000 ? (Instruction ? word >> 16 | 0x40 : 0x7fc0) : rounded;
    const auto out = static_cast<std::uint16_t>(rounded);
    std::memcpy(to + 2 * i, &out, 2);
  }
}

// Rows [begin, begin + count) of every token: bias, rounding, store.
void finish(const LinearArguments& a, const LinearOps& ops, std::size_t rows, std::size_t begin, std::size_t count,
            float* sums, std::size_t stride) {
  for (std::size_t t = 0; t < a.tokens; ++t) {
    float* s = sums + t * stride;
    if (a.bias) {
      for (std::size_t i = 0; i < count; ++i) s[i] += load_float(a.bias, a.bias_f32, begin + i);
    }
    std::uint8_t* out = a.out + (t * rows + begin) * (a.x_f32 ? 4 : 2);
    if (a.x_f32) {
      std::memcpy(out, s, 4 * count);
      continue;
    }
    if (ops.vcvtneps2bf16) {
      to_bf16<true>(s, count, out);
    } else {
      to_bf16<false>(s, count, out);
    }
  }
}

// Packs the activations, then runs body(product, first block, blocks, tail scratch) over all blocks on all threads;
// tail_bytes(block) is the tail scratch that a block needs.
template <class TailBytes, class Body>
void over_blocks(std::size_t rows, std::size_t cols, const LinearArguments& a, const LinearOps& ops,
                 TailBytes tail_bytes, Body body) {
  if (!a.tokens) return;
  const std::size_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  // Not thread_local: the worker threads read it.
  const Buffer packed(ops.packed_bytes(a.tokens, cols, a.x_f32));
  ops.pack({a.x, a.x_f32, a.tokens, cols}, packed.data());

  const std::size_t per_block = cols * kBlockRows;
  const std::size_t share = std::max<std::size_t>(1, blocks / (4 * static_cast<std::size_t>(std::max(a.threads, 1))));
  std::size_t per_task = std::min(share, 1 + kWeightsPerTask / per_block);
  per_task = (per_task + ops.blocks_at_once - 1) / ops.blocks_at_once * ops.blocks_at_once;
  parallel_for((blocks + per_task - 1) / per_task, 1, a.threads, [&](std::size_t task) {
    [[maybe_unused]] const DefaultFloats floats{};
    const std::size_t task_end = std::min(blocks, (task + 1) * per_task);
    for (std::size_t first = task * per_task; first < task_end; first += ops.blocks_at_once) {
      const std::size_t count = std::min(ops.blocks_at_once, task_end - first);
      const std::size_t begin = first * kBlockRows, end = std::min(rows, begin + count * kBlockRows);
      const std::size_t stride = ops.blocks_at_once * kBlockRows, scratch_bytes = ops.scratch_bytes(a.tokens, cols);
      const std::size_t sums_bytes = pad64(4 * a.tokens * stride);
      std::size_t tails = 0;
      for (std::size_t i = first; i < first + count; ++i) tails += tail_bytes(i);
      std::uint8_t* at = workspace.reserve(sums_bytes + pad64(scratch_bytes) + tails);
      LinearProduct p{};
      p.cols = cols, p.tokens = a.tokens, p.k_block = a.k_block, p.f32 = a.x_f32;
      p.x = packed.data();
      p.sums = reinterpret_cast<float*>(at), p.sums_stride = stride;
      p.scratch = at + sums_bytes;
      body(p, first, count, at + sums_bytes + pad64(scratch_bytes));
      finish(a, ops, rows, begin, end - begin, p.sums, stride);
    }
    workspace.release();
  });
}

}  // namespace

std::span<const LinearOps* const> linear_implementations() {
  static constexpr const LinearOps* kAll[] = {
      &kLanesScalar,         &kPairwiseScalar,      &kVdpbf16Scalar,    &kEmulatedScalar,    &kTdpbf16Scalar,
#if BITFORBIT_X86
      &kLanesAvx2,           &kLanesAvx512,         &kLanesAvx512Vbmi2, &kLanesAvx512Bf16,   &kPairwiseAvx512,
      &kPairwiseAvx512Vbmi2, &kVdpbf16Avx2,         &kVdpbf16Avx512,    &kVdpbf16Avx512Bf16, &kEmulatedAvx2,
      &kEmulatedAvx512,      &kEmulatedAvx512Vbmi2, &kTdpbf16Amx,
#endif
  };
  return kAll;
}

const LinearOps* find_linear(std::string_view family, std::string_view isa, bool f32) {
  const LinearOps* best = nullptr;
  for (const LinearOps* ops : linear_implementations()) {
    if (ops->family != family || !(f32 ? ops->f32 : ops->bf16) || (ops->usable && !ops->usable())) continue;
    for (const Implementation& level : implementations()) {
      if (level.name == ops->isa && level.supported) best = ops;
      if (level.name == isa) break;
    }
  }
  return best;
}

std::vector<std::string_view> linear_families() {
  std::vector<std::string_view> names;
  for (const LinearOps* ops : linear_implementations()) {
    if (std::find(names.begin(), names.end(), ops->family) == names.end()) names.push_back(ops->family);
  }
  return names;
}

void linear(const PlanesParts& parts, const Layout& layout, const LinearArguments& a, const LinearOps& ops) {
  const BlockReader reader(parts, layout);
  over_blocks(
      layout.rows, layout.cols, a, ops, [&](std::size_t block) { return tail_scratch_bytes(reader.at(block)); },
      [&](const LinearProduct& p, std::size_t first, std::size_t count, std::uint8_t* tails) {
        DecodeBlock blocks[kMostBlocksAtOnce];
        for (std::size_t i = 0; i < count; ++i) {
          blocks[i] = reader.at(first + i);
          const std::size_t bytes = tail_scratch_bytes(blocks[i]);
          give_tail_scratch(blocks[i], tails);
          tails += bytes;
        }
        if (!ops.multiply(p, blocks, count)) throw reader.contradiction(first);
      });
}

void linear_dense(const std::uint8_t* weight, std::size_t rows, std::size_t cols, const LinearArguments& a,
                  const LinearOps& ops) {
  over_blocks(
      rows, cols, a, ops, [](std::size_t) { return std::size_t{0}; },
      [&](const LinearProduct& p, std::size_t first, std::size_t count, std::uint8_t*) {
        const std::size_t begin = first * kBlockRows;
        ops.multiply_dense(p, weight + 2 * begin * cols, std::min(rows - begin, count * kBlockRows));
      });
}

}  // namespace bitforbit
