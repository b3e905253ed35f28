// The extension module bitforbit.cpu._native. Only the files of this folder know nanobind.
#include "bindings/module.hpp"

#include "errors.hpp"
#include "parallel.hpp"

NB_MODULE(_native, m) {
  // Translated to bitforbit.errors.CorruptTensorError by the Python wrappers.
  nb::exception<bitforbit::CorruptData>(m, "CorruptData", PyExc_ValueError);
  bind_planes(m);
  bind_df11(m);
  bind_linear(m);
  bind_kv(m);
  bind_tiled_attention(m);
  m.def(
      "use_parallel_region",
      [](std::uintptr_t address) {
        bitforbit::use_parallel_region(reinterpret_cast<bitforbit::ParallelRegion>(address));
      },
      nb::arg("address"));
}
