// Products of activations with an encoded BF16 matrix: validation, threads, bias, rounding of the output.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "linear_block.hpp"
#include "planes.hpp"

namespace bitforbit {

// Every implementation of every family, in order of preference: the last usable one wins.
std::span<const LinearOps* const> linear_implementations();

// The best implementation of that family for these activations at instruction set level `isa` (or below), or nullptr.
const LinearOps* find_linear(std::string_view family, std::string_view isa, bool f32);

// Names of all families, in the order of their first implementation.
std::vector<std::string_view> linear_families();

struct LinearArguments {
  const std::uint8_t* x;  // [tokens, cols] BF16 or F32
  bool x_f32;
  std::size_t tokens;
  std::uint8_t* out;         // [tokens, rows], dtype as x
  const std::uint8_t* bias;  // [rows] or nullptr
  bool bias_f32;
  std::size_t k_block;
  int threads;
};

// out = x * weight^T + bias in FP32, in the order of `ops`, rounded to the dtype of x. layout.kind is BF16, not wide.
// Throws CorruptData (`out` is then partly written); whatever the parts hold, nothing outside them and `out` is
// touched.
void linear(const PlanesParts& parts, const Layout& layout, const LinearArguments& a, const LinearOps& ops);

// The same from plain BF16 [rows, cols].
void linear_dense(const std::uint8_t* weight, std::size_t rows, std::size_t cols, const LinearArguments& a,
                  const LinearOps& ops);

}  // namespace bitforbit
