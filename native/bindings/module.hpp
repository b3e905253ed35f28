// What the binding files share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <memory>

namespace nb = nanobind;

using ConstBytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using NumpyBytes = nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>>;

void bind_planes(nb::module_& m);
void bind_df11(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_kv(nb::module_& m);
void bind_tiled_attention(nb::module_& m);
