// Python view of tiled_attention.hpp. Arguments are checked by the typed wrapper in bitforbit.cpu.tiled_attention.
#include "tiled_attention.hpp"

#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <stdexcept>
#include <string>

#include "bindings/module.hpp"

namespace {

using ConstFloats = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using MutableFloats = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void tiled_attention(const ConstFloats& q, const ConstFloats& k, const ConstFloats& v, const MutableFloats& out,
                     float scaling, bool square, std::size_t rows, std::string_view isa, int threads) {
  for (std::size_t i = 0; i < 3; ++i) {
    if (q.shape(i) != out.shape(i) || k.shape(i) != v.shape(i) || (i != 1 && q.shape(i) != k.shape(i)) ||
        q.shape(i) == 0 || k.shape(i) == 0) {
      throw std::invalid_argument("size mismatch");
    }
  }
  if (rows == 0 || rows > std::size_t{1} << 20) throw std::invalid_argument("rows out of range");
  const bitforbit::TiledAttentionArguments a{q.data(),   k.data(),   v.data(), out.data(), q.shape(0), q.shape(1),
                                             k.shape(1), q.shape(2), scaling,  square,     rows,       threads};
  nb::gil_scoped_release release;
  bitforbit::tiled_attention(a, bitforbit::find_tiled_attention(isa));
}

}  // namespace

void bind_tiled_attention(nb::module_& m) {
  m.def(
      "tiled_attention_implementation",
      [](std::string_view isa) { return std::string(bitforbit::find_tiled_attention(isa).isa); }, nb::arg("isa"));
  m.def("tiled_attention", &tiled_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("out").noconvert(),
        nb::arg("scaling"), nb::arg("square"), nb::arg("rows"), nb::arg("isa"), nb::arg("threads"));
}
