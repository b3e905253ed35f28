// Python view of linear.hpp. Arguments are checked by the typed wrapper in bitforbit.cpu.linear, sizes here too.
#include "linear.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/module.hpp"

namespace {

using bitforbit::LinearArguments;
using bitforbit::LinearOps;

const LinearOps& ops_of(std::string_view family, std::string_view isa, bool f32) {
  const LinearOps* found = bitforbit::find_linear(family, isa, f32);
  if (!found) throw std::invalid_argument("no such family of products on this CPU: " + std::string(family));
  return *found;
}

// The limits of docs/format.md, section 3.1, which keep every product of sizes within 64 bits.
void check_shape(std::size_t rows, std::size_t cols) {
  constexpr std::size_t kMost = std::size_t{1} << 48;
  if (rows == 0 || cols == 0 || rows > kMost / cols) throw std::invalid_argument("matrix out of range");
}

LinearArguments arguments(const ConstBytes& x, bool x_f32, const MutableBytes& out, std::optional<ConstBytes>& bias,
                          bool bias_f32, std::size_t rows, std::size_t cols, std::size_t k_block, int threads) {
  const std::size_t item = x_f32 ? 4 : 2, tokens = x.size() / (item * cols);
  if (x.size() != tokens * item * cols || out.size() != tokens * item * rows ||
      (bias && bias->size() != rows * (bias_f32 ? 4 : 2))) {
    throw std::invalid_argument("size mismatch");
  }
  return {x.data(), x_f32, tokens, out.data(), bias ? bias->data() : nullptr, bias_f32, k_block, threads};
}

void linear(const ConstBytes& code, const ConstBytes& digits, const ConstBytes& sign_mantissa, const ConstBytes& tails,
            std::size_t rows, std::size_t cols, std::size_t rows_per_table, const ConstBytes& x, bool x_f32,
            const MutableBytes& out, std::optional<ConstBytes> bias, bool bias_f32, std::string_view family,
            std::size_t k_block, std::string_view isa, int threads) {
  check_shape(rows, cols);
  if (rows_per_table == 0 || rows_per_table % bitforbit::kBlockRows) throw std::invalid_argument("rows_per_table");
  const LinearOps& ops = ops_of(family, isa, x_f32);
  const LinearArguments a = arguments(x, x_f32, out, bias, bias_f32, rows, cols, k_block, threads);
  const bitforbit::Layout layout{bitforbit::Kind::kBF16, false, rows, cols, rows_per_table};
  const bitforbit::PlanesParts parts{{code.data(), code.size()},
                                     {digits.data(), digits.size()},
                                     {sign_mantissa.data(), sign_mantissa.size()},
                                     {tails.data(), tails.size()}};
  nb::gil_scoped_release release;
  bitforbit::linear(parts, layout, a, ops);
}

void linear_dense(const ConstBytes& weight, std::size_t rows, std::size_t cols, const ConstBytes& x, bool x_f32,
                  const MutableBytes& out, std::optional<ConstBytes> bias, bool bias_f32, std::string_view family,
                  std::size_t k_block, std::string_view isa, int threads) {
  check_shape(rows, cols);
  if (weight.size() != 2 * rows * cols) throw std::invalid_argument("size mismatch");
  const LinearOps& ops = ops_of(family, isa, x_f32);
  const LinearArguments a = arguments(x, x_f32, out, bias, bias_f32, rows, cols, k_block, threads);
  nb::gil_scoped_release release;
  bitforbit::linear_dense(weight.data(), rows, cols, a, ops);
}

std::string implementation(std::string_view family, std::string_view isa, bool f32) {
  const LinearOps* found = bitforbit::find_linear(family, isa, f32);
  return found ? found->isa : "";
}

std::vector<std::string> families() {
  std::vector<std::string> names;
  for (const std::string_view name : bitforbit::linear_families()) names.emplace_back(name);
  return names;
}

}  // namespace

void bind_linear(nb::module_& m) {
  m.def("linear_families", &families);
  m.def("linear_implementation", &implementation, nb::arg("family"), nb::arg("isa"), nb::arg("f32"));
  m.def("linear", &linear, nb::arg("code"), nb::arg("digits"), nb::arg("sign_mantissa"), nb::arg("tails"),
        nb::arg("rows"), nb::arg("cols"), nb::arg("rows_per_table"), nb::arg("x"), nb::arg("x_f32"),
        nb::arg("out").noconvert(), nb::arg("bias").none(), nb::arg("bias_f32"), nb::arg("family"), nb::arg("k_block"),
        nb::arg("isa"), nb::arg("threads"));
  m.def("linear_dense", &linear_dense, nb::arg("weight"), nb::arg("rows"), nb::arg("cols"), nb::arg("x"),
        nb::arg("x_f32"), nb::arg("out").noconvert(), nb::arg("bias").none(), nb::arg("bias_f32"), nb::arg("family"),
        nb::arg("k_block"), nb::arg("isa"), nb::arg("threads"));
}
